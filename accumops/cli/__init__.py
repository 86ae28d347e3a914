"""The command `accumops`, also `python -m accumops`.

The modules here import TensorFlow, Keras and NumPy inside functions, so that `--help` and usage errors take no time.
"""

import click

from accumops.cli.bench import bench
from accumops.cli.demo import demo
from accumops.cli.info import info
from accumops.cli.plan import plan
from accumops.cli.verify import verify

__all__ = ["main"]


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from accumops import __version__

        click.echo(f"accumops {__version__}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Train with large batches on small memory in TensorFlow and Keras.

    The commands silence TensorFlow's log. Set TF_CPP_MIN_LOG_LEVEL=0 to see it.
    """


for _command in (info, verify, demo, bench, plan):
    main.add_command(_command)
