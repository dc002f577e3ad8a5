"""The command line. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_fast.cli.demos import DEMOS

app = typer.Typer(
    name="rlhf-fast",
    help="Fused kernels and thin trainers for reinforcement learning on language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_state = {"traceback": False}


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("rlhf-fast"))
        raise typer.Exit


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fused kernels and thin trainers for reinforcement learning on language models."""
    _state["traceback"] = bool(os.environ.get("RLHF_FAST_TRACEBACK")) or traceback


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config, the data and the memory; train nothing.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Run a training stage from a YAML file, with key=value overrides."""
    _state["traceback"] = _state["traceback"] or traceback
    _call("train", "train", config, overrides or [], dry_run=dry_run)
    _call("train", "leave_ranks")


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    processes: Annotated[int | None, typer.Option(help="Devices; default: as the launcher says.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, in bytes.")] = False,
) -> None:
    """Predict the peak memory of a configuration, by part; nothing is loaded."""
    _call("plan", "plan", config, overrides or [], processes=processes, as_json=as_json)


@app.command()
def demo(
    name: Annotated[str, typer.Argument(help=f"{', '.join(DEMOS)}, or all.")] = "grpo",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for what it leaves.")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Watch a small model learn on a task that needs no download."""
    _call("demos", "demo", name, output, seed)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Say what this machine can run, and what is missing."""
    _call("doctor", "doctor", as_json=as_json)


def _optional(name: str, summary: str) -> None:
    """A command whose options are its module's own, registered when the module is there."""
    if importlib.util.find_spec(f"rlhf_fast.cli.{name}") is None:
        return

    @app.command(
        name,
        help=summary,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def forward(context: typer.Context) -> None:
        inner = typer.Typer(pretty_exceptions_enable=False, context_settings=app.info.context_settings)
        module = importlib.import_module(f"rlhf_fast.cli.{name}")
        inner.command(help=summary)(getattr(module, name))
        command = typer.main.get_command(inner)
        with _clear_errors():
            command.main(list(context.args), prog_name=f"rlhf-fast {name}", standalone_mode=True)


_optional("bench", "Measure the kernels against the machine's limits and against other libraries.")


def _call(module: str, function: str, *args: Any, **kwargs: Any) -> None:
    with _clear_errors():
        loaded: Callable[..., Any] = getattr(importlib.import_module(f"rlhf_fast.cli.{module}"), function)
        loaded(*args, **kwargs)


def _mendable(error: RuntimeError) -> bool:
    """Whether a RuntimeError is one of ours that tell the user what to do."""
    from rlhf_fast.trainers.memory_advice import OutOfMemory
    from rlhf_fast.trainers.rollout.http_client import ServerError

    return isinstance(error, (OutOfMemory, ServerError))


def _foreign(error: BaseException) -> str:
    """A hint for a ValueError that another library raised, which may as well be a bug of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not isinstance(error, ValueError) or "rlhf_fast" in frames[-1].filename:
        return ""
    return f" (raised by {frames[-1].name} in {os.path.basename(frames[-1].filename)}; --traceback shows where)"


def _install(error: ModuleNotFoundError) -> str:
    """What brings a package that is missing; importlib.metadata has it in a sentence."""
    name = re.search(r"'([\w.-]+)", str(error)).group(1).split(".")[0]
    extra = [need for need in importlib.metadata.requires("rlhf-fast") or () if "'train'" in need or '"train"' in need]
    ours = {re.match(r"[\w-]+", need).group().lower() for need in extra}
    return f" (pip install {chr(39)}rlhf-fast[train]{chr(39)})" if name.lower() in ours else f" (pip install {name})"


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What the user can mend is one red line and exit code 2; `--traceback` shows the rest of it."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        if _state["traceback"] or (isinstance(error, RuntimeError) and not _mendable(error)):
            raise
        hint = ""
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("rlhf_fast"):
            hint = _install(error)
        line = " ".join(f"{error}".split()) or type(error).__name__
        typer.secho(f"error: {line}{hint}{_foreign(error)}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.secho("interrupted", fg=typer.colors.RED, err=True)
        raise typer.Exit(130) from None


def main() -> None:
    """The command, as a process of its own: it ends although a reward function that took too long goes on."""
    try:
        app(prog_name="rlhf-fast")
    except BaseException as error:
        calls = sys.modules.get("rlhf_fast.trainers.reward_calls")
        if calls is None or not calls.any_left_behind():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        for child in multiprocessing.active_children():  # workers of its pools
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
