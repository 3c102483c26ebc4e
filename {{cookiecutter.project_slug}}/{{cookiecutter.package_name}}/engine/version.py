"""The version of the engine: in each checkpoint, in W&B's configuration, in `main.py --version`."""

__version__ = "0.9.0"
