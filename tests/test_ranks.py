"""Traps of several ranks that can be seen in the code: what one rank does alone, what all do.

A collective that some ranks do not reach waits for ever; a line or a file that all of them write is
there many times.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

COLLECTIVES = re.compile(
    "barrier|broadcast|(all_)?reduce|(all_)?gather(_object)?|broadcast_object_list|save_checkpoint"
    "|log_dir"  # of a trainer: Lightning broadcasts it
)
RANKS = {
    "is_global_zero",
    "global_rank",
    "local_rank",
    "node_rank",
    "rank",
    "RANK",
    "LOCAL_RANK",
    "rank_zero_only",
}
HOOKS = re.compile(
    r"setup|teardown|(load_)?state_dict|(on|before|after|configure)_\w+|\w+_step|\w+_dataloader"
)
WRITES = {"write_text", "write_bytes", "mkdir", "touch", "unlink", "rmdir", "rename"}
OF_WANDB = {
    "engine/wandb_log.py",
    "engine/wandb_logger.py",
    "engine/wandb_options.py",
    "engine/wandb_session.py",
    "engine/wandb_sync.py",
    "engine/wandb_uploads.py",
    "callbacks.py",
}
LEAVES = (ast.Return, ast.Raise, ast.Continue, ast.Break)
RESEARCH = {"data.py", "model.py", "network.py"}


class Place(NamedTuple):
    """A part of the code, the function around it, and whether only some ranks come there."""

    node: ast.AST
    function: str
    alone: bool


def asks_for_rank(node: ast.AST) -> bool:
    names = (getattr(part, key, None) for part in ast.walk(node) for key in ("id", "attr", "value"))
    return any(name in RANKS for name in names if isinstance(name, str))


def places(node: ast.AST, function: str = "", alone: bool = False) -> Iterator[Place]:
    """All parts of a piece of code, outermost first."""
    yield Place(node, function, alone)
    if isinstance(node, ast.FunctionDef):
        function, alone = node.name, alone or any(map(asks_for_rank, node.decorator_list))
    branches = isinstance(node, ast.If | ast.While | ast.IfExp) and asks_for_rank(node.test)
    wraps = (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and asks_for_rank(node.func)
    )
    for name, value in ast.iter_fields(node):
        here = alone or wraps or (branches and name != "test")
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from places(part, function, here)
                leaves = isinstance(part, ast.If) and isinstance(part.body[-1], LEAVES)
                asks = leaves or (isinstance(node, ast.BoolOp) and name == "values")
                here = here or (asks and asks_for_rank(getattr(part, "test", part)))


def collective_of_some_ranks(file: str, tree: ast.Module) -> Iterator[ast.AST]:
    for node, _, alone in places(tree):
        logs = isinstance(node, ast.Attribute) and re.match(
            r"(self|pl_module|module)\.log(_dict)?$", ast.unparse(node)
        )
        if alone and isinstance(node, ast.Attribute) and (logs or COLLECTIVES.fullmatch(node.attr)):
            yield node


def line_of_every_rank(file: str, tree: ast.Module) -> Iterator[ast.AST]:
    for node, function, alone in places(tree):
        if (
            isinstance(node, ast.Name)
            and node.id == "print"
            and HOOKS.fullmatch(function)
            and not alone
        ):
            yield node


def file_of_every_rank(file: str, tree: ast.Module) -> Iterator[ast.AST]:
    for node, function, alone in places(tree):
        if isinstance(node, ast.Call) and HOOKS.fullmatch(function) and not alone:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            mode = (
                ast.unparse(node.args[-1]) if node.args[isinstance(node.func, ast.Name) :] else ""
            )
            if name in WRITES or (name == "open" and re.search("[wax]", mode)):
                yield node


def mean_of_means(file: str, tree: ast.Module) -> Iterator[ast.AST]:
    """Find means of means: a Metric needs no care, but `sync_dist` wants the size of each batch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "sync_dist":
            yield node.value
    for kind in (
        node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and file in RESEARCH
    ):
        methods = {
            method.name: method for method in kind.body if isinstance(method, ast.FunctionDef)
        }
        todo: list[str] = [name for name in ("validation_step", "test_step") if name in methods]
        for name in todo:  # and what they call
            metrics = [
                arg.arg
                for arg in methods[name].args.args
                if "Metric" in ast.unparse(arg.annotation or arg)
            ]
            for call in (node for node in ast.walk(methods[name]) if isinstance(node, ast.Call)):
                called = re.sub(r"^self\.", "", ast.unparse(call.func))
                todo += {called} & methods.keys() - {*todo}
                value = ast.unparse(call.args[-1]) if call.args else ""
                if (
                    called in ("log", "log_dict")
                    and value not in metrics
                    and not re.fullmatch(r"self\.\w+", value)
                ):
                    yield call


def wandb_elsewhere(file: str, tree: ast.Module) -> Iterator[ast.AST]:
    """`wandb.run` is None on all ranks but one, so whatever touches W&B has to know of ranks."""
    for node, _, _ in places(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        known = file in OF_WANDB
        if not known and any(name.split(".")[0] == "wandb" for name in names):
            yield node


Rule = Callable[[str, ast.Module], Iterator[ast.AST]]
RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        collective_of_some_ranks,
        line_of_every_rank,
        file_of_every_rank,
        mean_of_means,
        wandb_elsewhere,
    )
}
PLANTED = [  # each line that must be caught says so
    (
        "collective_of_some_ranks",
        """
        class Saves(Callback):
            def on_train_end(self, trainer, pl_module):
                if trainer.is_global_zero:
                    trainer.save_checkpoint("x.ckpt")  # caught
                    self.log("a", 1)  # caught
                else:
                    trainer.strategy.barrier()  # caught
                    self.logger.log("a", 1)
                trainer.strategy.barrier()
                if trainer.world_size > 1:
                    torch.distributed.all_gather_object([], {})
                rank_zero_only(print)(trainer.strategy.broadcast(1))
                rank_zero_only(trainer.save_checkpoint)("x.ckpt")  # caught
                if trainer.strategy.reduce(1) and trainer.global_rank == 1:
                    pass
                if trainer.global_rank == 1 and trainer.strategy.reduce(1):  # caught
                    pass
                trainer.is_global_zero and trainer.strategy.broadcast(1)  # caught
                folder = trainer.log_dir if trainer.is_global_zero else None  # caught

            @rank_zero_only
            def on_fit_end(self, trainer, pl_module):
                if trainer.world_size > 1:
                    torch.distributed.barrier()  # caught

            def on_fit_start(self, trainer, pl_module):
                with suppress(OSError):
                    if self.done or not trainer.is_global_zero:
                        return
                    trainer.strategy.broadcast(1)  # caught
        """,
    ),
    (
        "line_of_every_rank",
        """
        class Prints(Callback):
            def on_train_end(self, trainer, pl_module):
                print("done")  # caught
                if trainer.world_size > 1:
                    print("done")  # caught
                if trainer.is_global_zero:
                    print("done")
                rank_zero_only(print)("done")
                if not self.rank:
                    return
                print("done")

            @rank_zero_only
            def on_fit_end(self, trainer, pl_module):
                print("done")

            def helper(self):
                print("of whoever calls it")
        """,
    ),
    (
        "file_of_every_rank",
        """
        class Writes(Callback):
            def on_train_end(self, trainer, pl_module):
                Path("x").mkdir()  # caught
                self.file.write_text("x")  # caught
                open("x", "w").close()  # caught
                with self.file.open("a") as stream:  # caught
                    pass
                open("x").close()
                "a".replace("a", "b")
                if trainer.is_global_zero:
                    Path("x").mkdir()
        """,
    ),
    (
        "mean_of_means",
        """
        class Model(LightningModule):
            def training_step(self, batch, batch_idx):
                self.log("train/loss", loss)
                self.log("train/loss", loss, sync_dist=True)  # caught

            def validation_step(self, batch, batch_idx):
                loss = F.cross_entropy(self(batch), batch)
                self.log("val/loss", loss)  # caught
                self.log("val/loss", self.loss, prog_bar=True)
                self.log("val/acc", self.acc(batch, batch))  # caught
                self._shared(batch, self.acc)

            def _shared(self, batch, metrics: MetricCollection, loss: Tensor):
                self.log_dict(metrics)
                self.log_dict({"val/loss": loss})  # caught
                self.log("val/loss", loss)  # caught

            def on_train_epoch_end(self):
                self.log("time", time.time())
        """,
    ),
    (
        "wandb_elsewhere",
        """
        import wandb  # caught
        import os, wandb.sdk  # caught
        from wandb import Run  # caught
        from .wandb import Wandb
        from .engine.wandb_logger import RunWandbLogger

        def refusal():
            import wandb  # caught
        """,
    ),
]


def found(rule: str, file: str, text: str) -> list[int]:
    return sorted({getattr(node, "lineno", 0) for node in RULES[rule](file, ast.parse(text))})


@pytest.mark.parametrize(("rule", "text"), PLANTED, ids=[rule for rule, _ in PLANTED])
def test_a_planted_trap_is_found_and_nothing_else(rule: str, text: str) -> None:
    lines = re.sub(r"^ {8}", "", text, flags=re.MULTILINE).splitlines()
    planted = [number for number, line in enumerate(lines, 1) if line.endswith("# caught")]
    assert planted
    assert found(rule, "model.py", "\n".join(lines)) == planted


@pytest.mark.parametrize("rule", RULES)
def test_the_project_has_no_such_trap(rule: str, project: Path) -> None:
    package = project / "my_project"
    files = [file.relative_to(package).as_posix() for file in package.rglob("*.py")]
    assert {*RESEARCH, *OF_WANDB} <= {*files}
    for file in files:
        lines = found(rule, file, (package / file).read_text(encoding="utf-8"))
        assert not lines, f"{rule} in {file}, lines {lines}"
