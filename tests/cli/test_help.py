import subprocess
import sys
from pathlib import Path

import click
import pytest
from cospadi_cli.main import main
from cospadi_cli.options import describe

from cospadi.recipe.options import CalibrationConfig, CompressionConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_docs_are_what_help_says():
    command = [sys.executable, str(DOCS / "make_cli.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from cospadi_cli.main import main\n"
        "try: main(['compress', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--ratio" in done.stdout
    assert not {"torch", "transformers", "numpy", "scipy", "numba"} & set(done.stderr.split())


def test_every_field_of_the_recipe_has_a_flag_with_help():
    flags = {parameter.name: parameter for parameter in main.commands["compress"].params}
    for model, prefix in ((CompressionConfig, ""), (CalibrationConfig, "calibration_")):
        for name in model.model_fields:
            if name != "calibration":
                assert describe(model, name), name
                assert describe(model, name).split()[0] in flags[prefix + name].help


def test_no_arguments_show_the_help(run):
    result = run()
    assert result.exit_code == 0
    assert "compress" in result.stdout


def test_version(run):
    import cospadi

    assert run("--version").stdout.split()[-1] == cospadi.__version__


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_explains_itself(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
