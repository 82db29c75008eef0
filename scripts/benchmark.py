__import__("sys").path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
"""How fast it is, as ratios to bare PyTorch, torchvision and pytorch-metric-learning on the same machine.

    python scripts/benchmark.py                        # all groups, on two cores about 25 minutes
    python scripts/benchmark.py --rows step memory     # some
    python scripts/benchmark.py --quick                # every group in small, to see that it works: no measurement

Both sides of a ratio run in turn in one process (memory, startup and scaling: in processes of their own), as often as
--repeats says; the table shows the median and the spread, the target where there is one, and the medians behind it.
Let nothing else run meanwhile.
"""


from engine import distributed, files
from engine.errors import one_line_errors
from engine.flags import Parser, add_device, add_switch, given_path, number_in
from engine.hardware import num_cores
from engine.precision import AMP, CHANNELS_LAST
from scripts.benchmarks.heads import head_rows
from scripts.benchmarks.inputs import epoch_rows, evaluation_rows, input_rows
from scripts.benchmarks.measuring import HEADER, Bench, machine, text_of
from scripts.benchmarks.processes import scaling_rows, startup_rows
from scripts.benchmarks.steps import compile_rows, memory_rows, precision_rows, step_rows

GROUPS = {
    "step": step_rows,
    "memory": memory_rows,
    "epoch": epoch_rows,
    "input": input_rows,
    "heads": head_rows,
    "evaluation": evaluation_rows,
    "startup": startup_rows,
    "precision": precision_rows,
    "compile": compile_rows,
    "scaling": scaling_rows,
}


@one_line_errors
def parse_args(argv: list[str] | None = None):
    parser = Parser("Ratios to bare PyTorch, torchvision and pytorch-metric-learning, measured side by side.")
    parser.add_argument("--rows", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help="what")
    add_device(parser)
    parser.add_argument("--json", type=given_path, metavar="FILE", help="write all repeats there")
    halved = "of a row; of memory, scaling and epochs half as many"
    parser.add_argument("--repeats", type=number_in(1, kind=int), default=5, metavar="N", help=halved)
    add_switch(parser, "--quick", False, "tiny sizes: a smoke test")
    parser.add_argument("--amp", choices=AMP, default="off", help="of both sides of step, memory and epoch")
    parser.add_argument("--channels_last", choices=CHANNELS_LAST, default="auto", help="likewise")
    add_switch(parser, "--compile", False, "likewise")
    return parser.parse_args(argv)


@one_line_errors
def main(args) -> dict:
    """Print the table as it grows; returns the content of ``--json``."""
    device = distributed.start(args.device)
    bench = Bench(device, args.repeats, num_cores(), args.quick, args.amp, args.channels_last, args.compile)
    about = machine(bench) | {"repeats": args.repeats, "quick": args.quick, "amp": args.amp}
    about |= {"channels_last": args.channels_last, "compile": args.compile}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(HEADER, flush=True)
    rows = []
    for group in args.rows:
        for row in GROUPS[group](bench):
            if args.quick:
                row = row._replace(at_least=None, at_most=None)
            print(text_of(row), flush=True)
            rows.append(row._asdict() | {"median": row.median, "verdict": row.verdict})
            if args.json:
                files.write_json(args.json, {**about, "rows": rows})
    return {**about, "rows": rows}


if __name__ == "__main__":
    main(parse_args())
