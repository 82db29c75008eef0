__import__("sys").path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
"""Check a data folder before training: broken files, leaks between splits, class sizes and what they suggest.

    python scripts/audit_data.py data/CIFAR10      # prints a summary, writes audit.json and audit.png there

Exit code 1 when something must be acted on. 60,000 images of 32 px take about half a minute on two cores.
"""

from pathlib import Path

from data.audit import audit
from data.audit_report import save_distribution, summary_lines
from data.folders import known_names, read_about
from data.listing import ACT, listing
from engine.console import say
from engine.errors import Failed, Refused, one_line_errors
from engine.files import write_json
from engine.flags import Parser, given_path, number_in
from engine.hardware import num_cores


def parse_args(argv: list[str] | None = None):
    parser = Parser("Check a data folder before training; exit code 1 when something must be acted on.")
    count = number_in(0, kind=int)
    add = parser.add_argument
    add("data_dir", type=given_path, metavar="DIR", help="folder with train/, val/ and test/")
    add("--list_dir", type=given_path, metavar="DIR", help="image lists in place of folders")
    add("--output", type=given_path, metavar="DIR", help="for audit.json and audit.png; default: the data folder")
    add("--near_limit", type=count, default=100_000, metavar="N", help="most images searched for near-duplicates")
    add("-j", "--workers", type=number_in(1, kind=int), default=num_cores(), metavar="N", help="reading threads")
    return parser.parse_args(argv)


@one_line_errors
def main(args) -> None:
    if not args.data_dir.is_dir():
        raise Refused(f"data folder {args.data_dir} does not exist; prepare one with scripts/prepare_data.py")
    try:
        to_act_on = check(args.data_dir, args.list_dir, args.output or args.data_dir, args.workers, args.near_limit)
    except OSError as error:
        raise Failed(f"{args.data_dir} could not be checked: {error}") from None
    if to_act_on:
        raise Failed(f"{to_act_on} finding(s) in {args.data_dir} must be acted on; audit.json has them all")


def check(root: Path, list_dir: Path | None, output: Path, workers: int, near_limit: int) -> int:
    """Print and write the audit of ``root``; returns how many findings must be acted on."""
    readable = known_names(read_about(root))
    findings, figures = audit(listing(root, list_dir), workers, near_limit)
    say("\n".join(summary_lines(root, findings, figures)))
    output.mkdir(parents=True, exist_ok=True)
    report = {**figures, "findings": [finding._asdict() for finding in findings]}
    write_json(output / "audit.json", report)
    save_distribution(figures["counts"], readable, output / "audit.png")
    return sum(finding.level == ACT for finding in findings)


if __name__ == "__main__":
    main(parse_args())
