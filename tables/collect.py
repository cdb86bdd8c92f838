"""Gather the results of tables into one Markdown file, and draw the curve of table 1.

    python tables/collect.py output/tables --output tables.md --curve curve.png
"""
import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fileio.files import check_writable, read_json, write_text
from flags import Parser
from tables import continual_report, report
from utils import InputError, print0, run


class Form(NamedTuple):
    """Results of a table: what makes Markdown of them, and which keys they have."""
    markdown: Callable
    keys: set[str]


# by the name of a table, which is that of its folder
FORMS = {**dict.fromkeys(report.MARKDOWN, Form(report.markdown, report.KEYS)),
         continual_report.NAME: Form(continual_report.markdown, continual_report.KEYS)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add('results', nargs='+', metavar='PATH', help=f'a {report.RESULTS}, or the --output-dir of tables')
    add('--output', required=True, metavar='FILE.md')
    add('--curve', metavar='FILE.png', help='of the first table 1 among them; needs matplotlib')
    return parser.parse_args(argv)


def results_in(path: Path) -> list[Path]:
    """The results that a path stands for, in the order of the tables. Raises InputError where there are none."""
    if not path.is_dir():
        return [path]
    found = [path / name / report.RESULTS for name in FORMS if (path / name / report.RESULTS).exists()]
    if not found:
        raise InputError(f'{path}: no {"/, ".join(FORMS)}/ with a {report.RESULTS} in it: run a table first')
    return found


def read(path: Path) -> dict[str, Any]:
    """The results of a table. Raises InputError."""
    results = read_json(path)
    table = results.get('table') if isinstance(results, dict) else None
    if table not in FORMS or not FORMS[table].keys <= results.keys():
        raise InputError(f'{path}: no results of a table; give a {report.RESULTS} that the scripts of tables/ wrote')
    return results


def main(args: argparse.Namespace) -> None:
    paths = [found for path in args.results for found in results_in(Path(path))]
    tables = [read(path) for path in paths]
    for output in filter(None, (args.output, args.curve)):
        check_writable(output, inputs=[str(path) for path in paths])
    if args.curve:
        storage = next((table for table in tables if table['table'] == 'storage'), None)
        if storage is None or not report.points(storage, 'files'):
            raise InputError(f'--curve: none of {", ".join(map(str, paths))} is a table 1 with results')
        report.draw_curve(storage, Path(args.curve))
        print0(args.curve)
    write_text(args.output, '\n'.join(FORMS[table['table']].markdown(table) for table in tables))
    print0(args.output)


if __name__ == '__main__':
    run(main, parse_args)
