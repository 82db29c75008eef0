"""Images from a Stable Diffusion model through diffusers, which is imported when the first one is drawn."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps

from data.images import read_image
from data.synthesis import Job, Recipe
from engine.errors import Failed, Refused, is_out_of_memory

SCHEDULERS = {  # name: class in diffusers
    "ddim": "DDIMScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
SMALL_GPU = 8 * 2**30  # bytes; below, attention and decoding go piece by piece: slower, but they fit


class Drawn(NamedTuple):
    image: Image.Image
    flagged: bool  # by the model's safety checker, which has painted it black
    precision: str  # float16 or float32


class Diffusion:
    """A Stable Diffusion pipeline (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
    2022), in float16 on a GPU, else in float32.

    Every image has a generator of its own on the CPU, so its noise depends neither on its batch nor on the device.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.precision = "float16" if device.type == "cuda" else "float32"
        try:
            self.pipeline = load_pipeline(recipe).to(device, getattr(torch, self.precision))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise Failed(f"--model {recipe.model} does not fit into the memory of {device}; try --device cpu") from None
        self.pipeline.set_progress_bar_config(disable=True)
        if device.type == "cuda":
            torch.backends.cudnn.deterministic = True
            if torch.cuda.get_device_properties(device).total_memory < SMALL_GPU:
                self.pipeline.enable_attention_slicing()
                self.pipeline.vae.enable_slicing()
        sample = self.pipeline.unet.config.sample_size
        own = (sample if isinstance(sample, int) else sample[0]) * self.pipeline.vae_scale_factor
        self.size = recipe.size or own

    def draw(self, jobs: list[Job], steps: int | None = None) -> list[Drawn]:
        """The images of ``jobs``, in one batch; ``steps`` of denoising if not those of the recipe."""
        recipe = self.recipe
        if recipe.mode == "img2img":
            extra = {"image": [self.starting_image(job.start) for job in jobs], "strength": recipe.strength}
        else:
            extra = {"height": self.size, "width": self.size}
        output = self.pipeline(
            [job.prompt for job in jobs],
            negative_prompt=[recipe.negative_prompt] * len(jobs),
            num_inference_steps=steps or recipe.steps,
            guidance_scale=recipe.guidance,
            generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
            **extra,
        )
        flagged = output.nsfw_content_detected or [False] * len(jobs)
        images = [self.saved(image) for image in output.images]
        return [Drawn(image, bool(flag), self.precision) for image, flag in zip(images, flagged, strict=True)]

    def starting_image(self, path: Path) -> Image.Image:
        return ImageOps.fit(read_image(path), (self.size, self.size), Image.Resampling.LANCZOS)

    def saved(self, image: Image.Image) -> Image.Image:
        side = self.recipe.saved_size or image.width
        return image if side == image.width else image.resize((side, side), Image.Resampling.LANCZOS)


def load_pipeline(recipe: Recipe):
    """The pipeline from a folder or the Hugging Face hub; `Refused` in one line. Weights in pickles are not opened."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise Refused(
            f"synthetic images need diffusers and transformers ({error}): pip install -r requirements.txt"
        ) from None
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.ERROR)
        library.utils.logging.disable_progress_bar()
    folder = Path(recipe.model)
    kind = diffusers.StableDiffusionImg2ImgPipeline if recipe.mode == "img2img" else diffusers.StableDiffusionPipeline
    try:
        if folder.is_dir():
            refuse_other_pipelines(folder)
        pipeline = kind.from_pretrained(
            recipe.model, use_safetensors=True, local_files_only=folder.is_dir(), low_cpu_mem_usage=False
        )
        if recipe.scheduler:
            scheduler = getattr(diffusers, SCHEDULERS[recipe.scheduler])
            pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    except Refused:
        raise
    except Exception as error:  # those of two libraries, of the network and of JSON share no base class
        reason = " ".join(str(error).split())[:200]
        raise Refused(
            f"--model {recipe.model} cannot be loaded ({reason}); without a network give a folder that diffusers "
            f"saved: it holds model_index.json, and weights in .safetensors files"
        ) from None
    return pipeline


def refuse_other_pipelines(folder: Path) -> None:
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    if name not in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
        raise Refused(f"--model {folder} holds a {name}; a StableDiffusionPipeline is needed")
