"""``cospadi-cli``: the group of commands, and the lines and exit codes of errors."""

import shlex
import sys
from typing import Any, NoReturn

import click

from cospadi.errors import CospadiError, UsageError
from cospadi.registry import nearest
from cospadi_cli.commands.bench import bench
from cospadi_cli.commands.compress import compress
from cospadi_cli.commands.decompress import decompress
from cospadi_cli.commands.demo import demo
from cospadi_cli.commands.evaluate import evaluate
from cospadi_cli.commands.generate import generate
from cospadi_cli.commands.inspect import inspect
from cospadi_cli.commands.registries import backends, formats, solvers
from cospadi_cli.commands.selftest import selftest
from cospadi_cli.commands.status import status
from cospadi_cli.commands.tune import tune

PROGRAM = "cospadi-cli"


class Group(click.Group):
    """A group whose errors are one line each: exit code 2 for misuse, 1 for failure, 130 for an interruption."""

    def main(  # type: ignore[override]  # click's own returns or not, by an argument that is fixed here
        self, args: Any = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run a command and leave with its exit code; ``ctx.obj`` is the command line."""
        args = list(sys.argv[1:] if args is None else args)
        # The commands print the line that resumes an interrupted run, so they need the command line.
        extra |= {"standalone_mode": False, "obj": shlex.join([PROGRAM, *args])}
        try:
            code = super().main(args, prog_name or PROGRAM, **extra)
        except click.Abort:
            _leave("interrupted", 130)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else PROGRAM
            _leave(f"{error.format_message()} (see {where} --help)", 2)
        except click.ClickException as error:
            _leave(error.format_message(), error.exit_code)
        except CospadiError as error:
            _leave(str(error), 2 if isinstance(error, UsageError) else 1)
        except OSError as error:
            _leave(str(error), 1)
        sys.exit(code if isinstance(code, int) else 0)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """Give a command, or suggest the nearest name."""
        command = super().get_command(ctx, cmd_name)
        if command is None:
            raise click.UsageError(f"unknown command {cmd_name!r}{nearest(cmd_name, self.list_commands(ctx))}", ctx)
        return command


def _leave(message: str, code: int) -> NoReturn:
    """Print an error on one line and exit."""
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(code)


@click.group(cls=Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cospadi", prog_name=PROGRAM)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Compress language models without training: each weight becomes dictionary x sparse coefficients.

    Begin with `cospadi-cli demo`, which needs nothing but this package.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _command in (
    *(bench, compress, decompress, demo, evaluate, generate, inspect, selftest, status, tune),
    *(solvers, backends, formats),
):
    main.add_command(_command)
