"""From a run directory to one HTML file that needs no network."""

from __future__ import annotations

from pathlib import Path

from guywire.core.errors import need

__all__ = ["render"]


def render(run_dir: Path) -> Path:
    """Write ``report.html`` of a run, from the files of its directory alone.

    A run that is unfinished or has failed trials gives a report too, which says what is missing.

    Args:
        run_dir: a directory that ``guywire compare`` wrote.

    Returns:
        The path of the report; it is replaced in one atomic step.

    Raises:
        DataError: the directory holds no run, or a damaged file.
        MissingExtraError: jinja2 (extra ``report``) or pyarrow (extra ``cli``) is not installed.
        CheckpointError: the report cannot be written.
    """
    need("jinja2", extra="report")
    from guywire.lab.report.compare import compare_page
    from guywire.lab.report.page import write_page
    from guywire.lab.report.read import read_run

    run_dir = Path(run_dir)
    return write_page(compare_page(read_run(run_dir)), run_dir / "report.html")
