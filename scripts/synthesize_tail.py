__import__("sys").path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
"""Draw synthetic images of rare classes with Stable Diffusion, into data/<name>/synthetic/<class>/.

    python scripts/synthesize_tail.py data/CIFAR10 --target 500 --dry_run      # how many images of each class, how long
    python scripts/synthesize_tail.py data/CIFAR10 --target 500
    python imagenet_lt_train.py --data_dir data/CIFAR10 --synthetic_weight 0.5

Stopped or killed, the same command goes on with the next image. Run again with another --filter_model or --target, it
judges the images it has again and draws only what is missing. Every image stays on the disk; manifest.jsonl says which
are kept, and synthetic.png shows them beside real ones.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch

from data.contact_sheet import save_contact_sheet
from data.diffusion import SCHEDULERS, Diffusion
from data.folders import ImageFolders, read_image_folders
from data.generation import fill, seconds_an_image
from data.pixel_sources import own_size
from data.synthesis import Job, Manifest, Plan, Recipe, locked_manifest, prompt_names, wanted_images
from data.synthetic_filters import Filters
from engine import distributed
from engine.agreement import Agreement
from engine.console import first_of, say
from engine.errors import Refused, one_line_errors
from engine.flags import Parser, add_device, add_root_model, add_switch, command_line, given_path, number_in
from engine.hardware import num_cores
from engine.run import find_run

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@one_line_errors
def parse_args(argv: list[str] | None = None):
    parser = Parser("Draw synthetic images of rare classes with Stable Diffusion.")
    count = number_in(1, kind=int)
    group = parser.add_argument_group("what")
    add = group.add_argument
    add("data_dir", type=given_path, metavar="DIR", help="folder with train/, val/ and test/")
    add("--list_dir", type=given_path, metavar="DIR", help="image lists in place of folders")
    add("--output", type=given_path, metavar="DIR", help="folder to write; default: synthetic/ in the data folder")
    add("--target", default="median", metavar="N|median|max", help="images of each class, real and synthetic")
    add("--max_candidates", type=number_in(1), default=2.0, metavar="F", help="at most drawn for one that is wanted")
    add_switch(group, "--dry_run", False, "print the plan, draw one batch to see how long it takes, write nothing")
    group = parser.add_argument_group("how")
    add = group.add_argument
    add("--model", default=MODEL, metavar="NAME|DIR", help="Stable Diffusion: name on the Hugging Face hub, or folder")
    add("--mode", choices=("text2img", "img2img"), default="text2img", help="img2img starts from the class's images")
    add("--prompt", default="a photo of a {}", metavar="TEXT", help="{} stands for the class's name")
    add("--negative_prompt", default="", metavar="TEXT", help="what should not be seen")
    add(
        "--class_names",
        type=given_path,
        metavar="FILE",
        help="JSON {class: name}; default: classes.json in the data folder",
    )
    add(
        "--strength", type=number_in(0, 1, open_low=True), default=0.7, metavar="S", help="img2img: 1 ignores the start"
    )
    add("--steps", type=count, default=50, metavar="N", help="of denoising")
    add("--guidance", type=number_in(0), default=7.5, metavar="G", help="classifier-free; 1 or less: none")
    add("--scheduler", choices=SCHEDULERS, help="default: the model's own")
    add("--size", type=number_in(8, kind=int), metavar="PX", help="side of what is drawn; default: the model's own")
    add("--saved_size", type=count, metavar="PX", help="default: the training images', if squares of one size up to 96")
    add("--seed", type=number_in(0, 2**31, kind=int), default=0, help="of all images")
    add("--batch_size", type=count, default=4, metavar="B", help="images drawn together")
    add_device(group, "; float16 on cuda")
    group = parser.add_argument_group("what is kept")
    add = group.add_argument
    add("--filter_model", metavar="RUN", help="a trained run that must find an image's class")
    add("--filter_top_k", type=count, default=1, metavar="K", help="among its first K")
    add_root_model(group)
    add("-j", "--workers", type=count, default=num_cores(), metavar="N", help="threads that read images")
    args = parser.parse_args(argv)
    if args.target not in ("median", "max"):
        if not args.target.isdecimal():
            raise Refused(f"--target {args.target} is neither a number of images nor median nor max")
        args.target = int(args.target)
    if "{}" not in args.prompt:
        raise Refused(f"--prompt {args.prompt!r} has no {{}} where the class's name belongs")
    if args.size and args.size % 8:
        raise Refused(f"--size {args.size} is no multiple of 8")
    if args.mode == "img2img" and int(args.steps * args.strength) < 1:
        raise Refused(f"--strength {args.strength:g} of --steps {args.steps} is not one step; give more of either")
    return args


@one_line_errors
def main(args) -> None:
    device = distributed.start(args.device)
    folders = read_image_folders(args.data_dir, args.list_dir)
    output = args.output or args.data_dir / "synthetic"
    names, plan = build_plan(args, folders)
    filters = build_filters(args, folders, output, device)
    manifest = Manifest(output)
    plan.refuse_other_recipe(manifest.rows, output)
    say(plan_text(folders, names, plan, manifest.rows))
    diffusion = functools.cache(lambda: Diffusion(plan.recipe, device))
    missing = manifest.missing(plan.next_jobs(manifest.rows))
    if missing:
        diffusion()  # a model that cannot be loaded leaves no folder behind
    if args.dry_run:
        say(time_estimate(args, plan, missing, diffusion) if missing else "nothing is left to draw")
        return
    with locked_manifest(output) as manifest:
        plan.refuse_other_recipe(manifest.rows, output)
        fill(plan, manifest, filters, diffusion, args.batch_size)
        save_contact_sheet(output / "synthetic.png", folders, names, manifest.rows, output)
    say(outcome(args, plan, manifest))


def build_plan(args, folders: ImageFolders) -> tuple[list[str], Plan]:
    names_file = args.class_names
    if names_file is None and (args.data_dir / "classes.json").is_file():
        names_file = args.data_dir / "classes.json"
    names, unnamed = prompt_names(folders, names_file)
    if unnamed:
        say(f"no readable name for {len(unnamed)} classes ({first_of(unnamed, 5)}): prompts hold their folders' names")
    given = {field.name: getattr(args, field.name) for field in fields(Recipe)}  # flags are named like them
    strength = args.strength if args.mode == "img2img" else None
    saved_size = args.saved_size or own_size(folders.splits["train"].paths)[0]
    recipe = Recipe(**given | {"strength": strength, "saved_size": saved_size})
    wanted = wanted_images(folders.class_counts, args.target)
    return names, Plan(folders, names, wanted, args.max_candidates, recipe)


def build_filters(args, folders: ImageFolders, output: Path, device: torch.device) -> Filters:
    agreement = None
    if args.filter_model:
        run = find_run(args.filter_model, args.root_model)
        agreement = Agreement(run, args.filter_top_k, folders.classes, device, args.workers)
    return Filters(folders, output, agreement, args.workers)


def plan_text(folders: ImageFolders, names: list[str], plan: Plan, rows: list[dict]) -> str:
    drawn = Counter(row["class"] for row in rows)
    width = max(len("class"), *map(len, names))
    lines = [f"{'class':{width}s}    real  wanted  drawn before"]
    for name, readable, real in zip(folders.classes, names, folders.class_counts, strict=True):
        lines.append(f"{readable:{width}s}  {real:6d}  {plan.wanted[name]:6d}  {drawn[name]:12d}")
    total, limit = sum(plan.wanted.values()), sum(plan.limits.values())
    lines.append(f"{total} synthetic images are wanted; for rejected ones others are drawn, {limit} images at most")
    return "\n".join(lines)


def time_estimate(args, plan: Plan, missing: list[Job], diffusion: Callable[[], Diffusion]) -> str:
    seconds = seconds_an_image(plan, missing[: args.batch_size], diffusion())
    whole = timedelta(seconds=round(seconds * len(missing)))
    return (
        f"{seconds:.2f} s an image on {diffusion().device}, measured on one batch: {whole} "
        f"for the {len(missing)} that are missing; the filters, and images in place of rejected ones, come on top"
    )


def outcome(args, plan: Plan, manifest: Manifest) -> str:
    rows = manifest.rows
    reasons = Counter(row["why"].split(":")[0] for row in rows if not row["kept"])
    kept = Counter(row["class"] for row in rows if row["kept"])
    lines = [f"kept {sum(kept.values())} of {len(rows)} images in {manifest.folder}"]
    lines += [f"{number:6d}  {reason}" for reason, number in reasons.most_common()]
    short = [f"{name}: {kept[name]} of {number}" for name, number in plan.wanted.items() if kept[name] < number]
    if short:
        lines.append(f"fewer than wanted: {first_of(short, 8)}; a higher --max_candidates draws more")
    told = {"data_dir": args.data_dir, "list_dir": args.list_dir, "synthetic_weight": 0.5, "synthetic_dir": args.output}
    command = command_line("imagenet_lt_train.py", told, {})
    lines.append(f"look at {manifest.folder / 'synthetic.png'}; train with: {command}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_args())
