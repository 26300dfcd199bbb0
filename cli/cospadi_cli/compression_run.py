"""The run of ``compress`` and ``demo``: a model becomes a checkpoint, measured before and after."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cospadi.errors import CospadiError, UsageError
from cospadi.events import Evaluated, Listener, Stopped
from cospadi.recipe import Execution
from cospadi_cli.console import print_json, quieten_libraries, working
from cospadi_cli.evaluation_protocol import PROMPT, check_backend, make_protocol, open_evaluation_text
from cospadi_cli.progress import progress
from cospadi_cli.report_tables import show_report
from cospadi_cli.signals import Terminated, stoppable

if TYPE_CHECKING:
    from cospadi.evaluation import Comparison, Protocol
    from cospadi.recipe import CompressionConfig
    from cospadi.reporting import Report


@dataclass(frozen=True)
class RunOptions:
    """The options of a run besides recipe, execution and evaluation; see their help in ``run_options``."""

    cache: Path | None
    resume: bool
    as_json: bool
    quiet: bool
    log_file: Path | None
    events: str | None

    def __post_init__(self) -> None:
        if self.as_json and self.events == "-":
            raise UsageError("--json and --events - both want standard output: write the events to a file")


def run_options(command: Any) -> Any:
    """Add the flags of ``RunOptions`` to a command."""
    for option in (
        click.option(
            "--events",
            metavar="FILE",
            help="Append every event to FILE, one JSON object a line (see docs/sdk.md); - writes them to standard "
            "output, in place of the tables.",
        ),
        click.option("--log-file", type=Path, metavar="FILE", help="Append the progress to FILE, with times in UTC."),
        click.option("--quiet", is_flag=True, help="No progress and no tables, only errors."),
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on standard output."),
        click.option("--resume", is_flag=True, help="Continue the interrupted run in OUT, if there is one."),
        click.option(
            "--cache",
            type=Path,
            help="Folder that keeps calibration and profile: another ratio of the model then costs only the solving.",
        ),
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class CompressionRun:
    """One compression with its closing evaluation.

    Attributes
    ----------
    typed : str
        The command line, to be repeated with --resume.
    config : CompressionConfig
    model : str or None
        Folder or hub id; None for the embedded model.
    out : Path
    execution : Execution
    options : RunOptions
    eval_text : str or None
        A file or ``hf:NAME``; None for the package's own text.
    eval_tokens : int
        Tokens of the closing evaluation; 0 for none.
    """

    typed: str
    config: "CompressionConfig"
    model: str | None
    out: Path
    execution: Execution
    options: RunOptions
    eval_text: str | None = None
    eval_tokens: int = 4096

    def execute(self) -> None:
        """Compress, evaluate, write the report and the card, and show them.

        Mistakes that can be found early are refused before anything is loaded.

        Raises
        ------
        CospadiError
            As from ``cospadi.compress``.
        """
        try:
            with stoppable():
                report = self._compress()
        except KeyboardInterrupt as stop:
            again = self._again()
            if again is not None:
                click.echo(f"\nFinished work is kept. To continue: {again}", err=True)
            if not isinstance(stop, Terminated):
                raise
            click.echo("Error: terminated", err=True)
            raise click.exceptions.Exit(143) from stop
        if self.options.as_json:
            print_json(report)
        elif not self.options.quiet and self.options.events != "-":
            show_report(report, self.out)

    def _compress(self) -> "Report":
        from cospadi.calibration import open_text
        from cospadi.pipeline import check_output, choose_method, compress
        from cospadi.reporting import write_report

        options = self.options
        choose_method(self.config)
        check_backend(self.config.backend)
        check_output(self.out, options.resume)
        next(open_text(self.config.calibration.text), "")
        text = open_evaluation_text(self.eval_text)
        quieten_libraries()
        model, protocol = self.model or _embedded(options.quiet), None
        if self.eval_tokens:
            protocol = make_protocol(model, text, self.eval_tokens, self.config.calibration.seq_len, PROMPT)
        with progress(options.quiet, options.log_file, options.events) as tell:
            try:
                report = compress(
                    model,
                    self.out,
                    self.config,
                    cache=options.cache,
                    resume=options.resume,
                    execution=self.execution,
                    command=self.typed,
                    on_event=tell,
                )
                if protocol is not None and report["evaluation"] is None:
                    report["evaluation"] = self._evaluate(model, protocol, tell).to_dict()
                    write_report(self.out, report)
            except KeyboardInterrupt as stop:
                tell(Stopped("terminated" if isinstance(stop, Terminated) else "interrupted", self._again()))
                raise
            except (CospadiError, OSError) as error:
                tell(Stopped(str(error), self._again()))
                raise
        return report

    def _evaluate(self, model: str, protocol: "Protocol", tell: Listener) -> "Comparison":
        from cospadi.evaluation import Comparison, measure_folders

        def progress(done: float, total: int) -> None:
            tell(Evaluated(int(done), total, work_done=done))

        paths, config = (model, self.out), self.config
        return Comparison(
            protocol, *measure_folders(paths, protocol, config.backend, config.device, self.execution, progress)
        )

    def _again(self) -> str | None:
        """Give the command that continues the run; None if nothing was begun or all is finished."""
        from cospadi.pipeline import WORK

        if not (self.out / WORK).is_dir():
            return None
        return self.typed if self.options.resume else f"{self.typed} --resume"


def _embedded(quiet: bool) -> str:
    from cospadi.models import embedded_model

    with working("preparing the embedded model", quiet):
        return str(embedded_model())
