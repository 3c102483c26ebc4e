"""The command line of this project: a LightningCLI. Add arguments, links and callbacks here."""

from lightning.pytorch.cli import LightningArgumentParser

from . import engine


class CLI(engine.CLI):
    """LightningCLI with `configs/defaults.yaml` below each run and a folder for each run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # The data knows how many classes there are; a model that takes no `num_classes` has none.
        parser.link_arguments(
            "data.num_classes", "model.init_args.num_classes", apply_on="instantiate"
        )
