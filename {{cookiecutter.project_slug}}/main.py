"""The command line: `python main.py fit --config configs/digits.yaml`, and `--help` after any part of it."""

from {{ cookiecutter.package_name }}.engine.run import main

if __name__ == "__main__":
    main()
