"""What the screen shows of a training: a line for each epoch, and below them a bar."""

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, convert_inf

from .checkpoints import best_saving
from .screen import GREEN, columns, has_colours, is_terminal, paint, say

REDRAW_INTERVAL = 0.2  # seconds
NARROWEST_BAR = 8  # columns; what stands beside it makes room
LINES = 2  # in a terminal, for the values of an epoch
SHORTEST_TEXT = 5  # columns of a value with its name, and of what is between two
CONTINUED = " " * 4  # what the second begins with
NARROWEST = 10  # columns of a terminal that a bar takes into account
RIGHT_MARGIN = 2  # columns for the ^C of a terminal: the line after the bar is left alone
DEFAULT_COLUMNS = 80  # of a terminal that does not say its width
Values = dict[str, Any]


class Bar(Tqdm):
    """A bar of tqdm's that fits any width, and is drawn five times a second at most.

    Args:
        describe: Takes `format_dict` of tqdm's; returns what stands before the bar, and behind it
            from the longest text to the shortest.
        options: Those of tqdm.
    """

    n: int

    def __init__(self, describe: Callable[[Values], tuple[str, list[str]]], **options: Any) -> None:
        self.describe = describe
        self.drawn = 0.0  # when, in seconds as time.monotonic
        colour = "cyan" if has_colours(sys.stdout) else None
        super().__init__(
            file=sys.stdout,
            dynamic_ncols=True,
            mininterval=REDRAW_INTERVAL,
            miniters=1,
            smoothing=0.1,
            colour=colour,
            **options,
        )

    @property
    def format_dict(self) -> Values:
        """What tqdm makes its text of, here with a format for the terminal's width."""
        values: Values = super().format_dict
        head, tails = self.describe(values)
        known = values["ncols"] or 0  # -1 where a terminal says that it has no columns
        width = max(known if known > 0 else DEFAULT_COLUMNS, NARROWEST) - RIGHT_MARGIN
        room = width - len(head) - len(" || ") - NARROWEST_BAR
        tail = next((tail for tail in tails if len(tail) <= room), tails[-1])
        return {**values, "ncols": width, "bar_format": head + " |{bar}| " + tail, "prefix": ""}

    def refresh(self, *args: Any, **options: Any) -> None:
        """Draw the bar, unless it was drawn just now."""
        now = time.monotonic()
        if now - self.drawn > REDRAW_INTERVAL:
            self.drawn = now
            super().refresh(*args, **options)

    def clear(self, *args: Any, **options: Any) -> None:
        """Make room for a line; the bar is drawn again as soon as that stands there."""
        self.drawn = 0.0
        super().clear(*args, **options)

    def go_to(self, done: int) -> None:
        """Set the number of batches, without counting those that this process did not do."""
        if not self.disable:
            self.last_print_n += done - self.n
            self.initial += done - self.n
            self.n = done

    def count_from(self, done: int) -> None:
        """Begin to measure the speed here."""
        self.go_to(done)
        self.unpause()
        self.refresh()

    def leave_out(self, seconds: float) -> None:
        """Do not count this time for the speed."""
        if not self.disable:
            self.last_print_t += seconds
            self.start_t += seconds


class TrainingBar(TQDMProgressBar):
    """Lightning's bar without metrics, and with the time that is left of epoch and run.

    Lightning's own reads the values of each step from the GPU, which then waits for them. A
    validation within `fit` is shown in the bar of the training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bar: Bar | None = None  # the newest
        self.show_warning: Any = None  # what shows warnings otherwise
        self.measures = False  # from the first batch on, which compiles and starts workers
        self.validating = False
        self.validated = 0  # batches of the validation that is under way
        self.validation_began = 0.0
        self.validation_seconds = 0.0  # in all epochs that this process has trained
        self.epoch_seconds = 0.0  # of it, in this epoch
        self.epochs = 0  # that this process has trained

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have warnings shown above the bar."""
        super().setup(trainer, pl_module, stage)
        show = self.show_warning or warnings.showwarning

        def show_above(*args: Any) -> None:
            with Tqdm.external_write_mode(sys.stderr):
                show(*args)

        self.show_warning, vars(warnings)["showwarning"] = show, show_above

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.show_warning is not None:
            self.show_warning, warnings.showwarning = None, self.show_warning

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {}

    def _evaluation_bar(self, text: str, leave: bool = True) -> Bar:
        self.bar = Bar(describe_evaluation, desc=text, leave=leave, disable=self.is_disabled)
        return self.bar

    def init_sanity_tqdm(self) -> Tqdm:
        return self._evaluation_bar(self.sanity_check_description, leave=False)

    def init_train_tqdm(self) -> Tqdm:
        total = epoch_batches(self.trainer, 0)
        disable = self.is_disabled
        self.bar = Bar(self.describe_training, total=total, leave=False, disable=disable)
        return self.bar

    def init_validation_tqdm(self) -> Tqdm:
        if self.trainer.state.fn == "fit":
            return Tqdm(disable=True)
        return self._evaluation_bar(self.validation_description)

    def init_test_tqdm(self) -> Tqdm:
        return self._evaluation_bar(self.test_description)

    def init_predict_tqdm(self) -> Tqdm:
        return self._evaluation_bar(self.predict_description)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        bar: Any = self.train_progress_bar
        bar.total = epoch_batches(trainer, 0)
        bar.go_to(0)
        bar.refresh()
        self.epoch_seconds = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        bar: Any = self.train_progress_bar
        batch = args[-1]
        if self.measures:
            bar.update()
            return
        self.measures = True
        bar.total = epoch_batches(trainer, batch + 1)  # it may be resumed within an epoch
        bar.count_from(batch + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.epochs += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self.validating, self.validated = True, 0
        self.validation_began = time.monotonic()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any
    ) -> None:
        super().on_validation_batch_end(trainer, pl_module, *args)
        self.validated += 1
        if trainer.state.fn == "fit":
            self.train_progress_bar.refresh()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validating = False
        super().on_validation_end(trainer, pl_module)
        bar = self.bar
        if bar is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            seconds = time.monotonic() - self.validation_began
            self.validation_seconds += seconds
            self.epoch_seconds += seconds
            bar.leave_out(seconds)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        self.teardown(trainer, pl_module, "")

    def describe_training(self, values: Values) -> tuple[str, list[str]]:
        """Return what stands before and behind the bar."""
        trainer, rate = self.trainer, speed(values)
        head = f"epoch {trainer.current_epoch}"  # counted from 0, as everywhere
        if (trainer.max_epochs or -1) > 0:
            head += f"/{trainer.max_epochs}"
        if self.validating:
            batches = convert_inf(sum(trainer.num_val_batches))
            head += f", validating {self.validated}/{batches or '?'}"
        epoch, run = self.seconds_left(values["n"], values["total"], rate)
        left = [f"left {Tqdm.format_interval(epoch)}"] if epoch is not None else []
        both = ", ".join([*left, f"run {Tqdm.format_interval(run)}"] if run is not None else left)
        return head, tails(values, rate, [both, *left])

    def seconds_left(
        self, done: int, total: float | None, rate: float | None
    ) -> tuple[float | None, float | None]:
        """Return what is left of the epoch and of the run, each None where it is not known.

        Args:
            done: Batches of this epoch that are done.
            total: Batches of an epoch.
            rate: Batches a second.
        """
        trainer = self.trainer
        if not rate:
            return None, None
        validation = self.validation_seconds / self.epochs if self.epochs else self.epoch_seconds
        epoch, limits = None, []
        if total:
            missing = max(0.0, validation - self.epoch_seconds)
            epoch = (total - done) / rate + missing
            later = (trainer.max_epochs or 0) - 1 - trainer.current_epoch
            limits = [epoch + later * (total / rate + validation)] if later >= 0 else []
        if trainer.max_steps >= 0:
            batches = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
            limits.append(batches * (1 / rate + (validation / total if total else 0)))
        limits += times_left(trainer)
        run = min(limits, default=None)
        return (epoch if epoch is None or run is None else min(epoch, run)), run


def epoch_batches(trainer: Trainer, done: int) -> float | None:
    """Return the batches of this epoch, which `max_steps` may end; None if they are not known.

    Args:
        trainer: The trainer.
        done: How many of them are done.
    """
    batches = trainer.num_training_batches
    if trainer.max_steps >= 0:
        steps = trainer.max_steps - trainer.global_step
        batches = min(batches, done + steps * trainer.accumulate_grad_batches)
    return convert_inf(batches)


def describe_evaluation(values: Values) -> tuple[str, list[str]]:
    """Return what stands before and behind the bar of a validation, a test or a prediction."""
    rate, total = speed(values), values["total"]
    time_of = Tqdm.format_interval
    if total and values["n"] >= total:
        times = [f"took {time_of(values['elapsed'])}"]
    else:
        times = [f"left {time_of((total - values['n']) / rate)}"] if total and rate else []
    return values["prefix"].removesuffix(": "), tails(values, rate, times)


def tails(values: Values, rate: float | None, times: list[str]) -> list[str]:
    """Return what stands behind a bar, from the longest text to the shortest."""
    batches = f"{values['n']}/{values['total'] or '?'}"
    texts = [f"{batches}  {time}" for time in times if time]
    if rate is None:
        return [*texts, batches, ""]
    pace = f"{1 / rate:.1f} s/it" if rate < 1 else f"{rate:.{0 if rate >= 100 else 1}f} it/s"
    full = "  ".join(filter(None, [batches, pace, *times[:1]]))
    return [full, *texts, batches, ""]


def speed(values: Values) -> float | None:
    """Return batches a second, lately or else on average; None before the first one."""
    done = values["n"] - values["initial"]
    average = done / values["elapsed"] if values["elapsed"] > 0 else 0
    return values["rate"] or average or None


def times_left(trainer: Trainer) -> list[float]:
    """Return the seconds that `max_time` leaves."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    left = [one.time_remaining() for one in callbacks if isinstance(one, Timer)]
    return [max(0.0, seconds) for seconds in left if seconds is not None]


class EpochLines(Callback):
    """Prints a line for each validation, and for each epoch without one; says which is the best.

    At an epoch's end the line waits until ModelCheckpoint has decided, which may be later.
    """

    def __init__(self) -> None:
        self.noted: tuple[str, dict[str, Any]] | None = None  # of a line that is not printed yet
        self.epoch = -1  # of the newest line
        self.values: dict[str, Any] = {}  # of the newest line
        self.best: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Be called after ModelCheckpoint."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [one for one in callbacks if one is not self]
        vars(trainer)["callbacks"] = [*others, self]  # a new list: the old one is being read

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.best, self.values = best_of(trainer), dict(trainer.callback_metrics)  # if it resumes

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.note(trainer)
            if not trainer.is_last_batch:
                self.show(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.epoch != trainer.current_epoch:
            self.note(trainer, only_new=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.show(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.show(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.show(trainer)

    def note(self, trainer: Trainer, only_new: bool = False) -> None:
        """Take the values for a line.

        Args:
            trainer: The trainer.
            only_new: Whether to leave out values that stand in the line before.
        """
        values = dict(trainer.callback_metrics)
        before, self.values, self.epoch = self.values, values, trainer.current_epoch
        if only_new:
            values = {name: one for name, one in values.items() if before.get(name) is not one}
        self.noted = f"epoch {self.epoch:<3} step {trainer.global_step:<6}", values

    def show(self, trainer: Trainer) -> None:
        """Print the line that was noted."""
        if self.noted is None or not trainer.is_global_zero:
            return
        (place, values), self.noted = self.noted, None
        before, self.best = self.best, best_of(trainer)
        is_best, width = self.best != before, columns(sys.stdout)
        if width:
            saving = best_saving(trainer)
            first = saving.monitor if saving else None
            say(line_for_terminal(place, values, is_best, first, width))
        else:
            texts = [f"{name} {value:.4g}" for name, value in sorted(values.items())]
            say(f"{place} {'  '.join([*texts, 'best'] if is_best else texts)}")


def line_for_terminal(
    place: str, values: dict[str, Any], is_best: bool, first: str | None, width: int
) -> str:
    """Return a line, or two, with as many values as fit, the one that decides first."""
    names = sorted(values, key=lambda name: (name != first, name.startswith("lr-"), name))
    mark = paint("best", GREEN, sys.stdout) if is_best else "    "
    texts = [f"{name} {values[name]:.4g}" for name in names]
    lines = fitted(texts, len(f"{place} best  "), width)
    return "\n".join([f"{place} {mark}  {lines[0]}".rstrip(), *lines[1:]])


def fitted(texts: list[str], indent: int, width: int) -> list[str]:
    """Return texts in at most two lines of a terminal, and how many more there are.

    Args:
        texts: None of them is broken.
        indent: Columns before the first line, which are not part of it.
        width: Columns of the terminal.
    """
    most = min(len(texts), LINES * width // SHORTEST_TEXT + 1)
    for count in range(most, 0, -1):
        rest = [f"+{len(texts) - count} in metrics.csv"] if count < len(texts) else []
        lines, before = [""], indent
        for text in [*texts[:count], *rest]:
            line = f"{lines[-1]}  {text}" if lines[-1] else text
            if before + len(line) <= width:
                lines[-1] = line
            else:
                lines, before = [*lines, text], len(CONTINUED)
        if len(lines) <= LINES or count == 1:
            return [lines[0], *(CONTINUED + line for line in lines[1:])]
    return [""]


def best_of(trainer: Trainer) -> tuple[str, float] | None:
    """Return the file of the best checkpoint and its value; None if there is none."""
    saving = best_saving(trainer)
    if saving is None or not saving.monitor or saving.best_model_score is None:
        return None
    return saving.best_model_path, float(saving.best_model_score)


def progress_callbacks() -> list[Callback]:
    """Return what shows the progress: a bar and lines in a terminal, else lines alone."""
    return [TrainingBar(), EpochLines()] if is_terminal(sys.stdout) else [EpochLines()]
