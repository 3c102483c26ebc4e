"""The command line: `python main.py fit --config configs/digits.yaml`; `--help` lists options."""

from typing import Any

from {{ cookiecutter.package_name }}.engine import command


def main(args: Any = None) -> Any:
    """Run one command: `main(["fit", "--config", "configs/digits.yaml"])`.

    Args:
        args: What follows the script on the command line; `sys.argv` if None.

    Returns:
        The CLI, with `trainer`, `model`, `datamodule`, `run` and `metrics`; None for a command
        that trains nothing, such as `sync`.
    """
    if not command(args):
        return None
    # Not before: it imports Lightning, which takes seconds.
    from {{ cookiecutter.package_name }}.cli import CLI

    return CLI(args=args)


if __name__ == "__main__":
    main()
