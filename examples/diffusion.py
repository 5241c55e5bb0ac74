"""Adapt the convolutions, attention and class embeddings of a diffusion model: train, save, load, merge.

    pip install diffusers                       # SMoA itself does not need it
    python examples/diffusion.py                # a U-Net, seconds on a CPU
    python examples/diffusion.py --model dit    # a diffusion transformer

Both models are tiny and start from random weights, so nothing is downloaded; the data are striped images of two
classes. For a model of yours load it in place of `unet()`, as with
`UNet2DConditionModel.from_pretrained("path/to/model", subfolder="unet")`, and name its layers in the same way.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from smoa_kernels.peft import SMoAConfig

CHANNELS, SIZE, CLASSES = 3, 16, 2


def unet() -> nn.Module:
    """A U-Net of two resolutions, the lower one with attention."""
    model: nn.Module = UNet2DModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=CLASSES,
    )
    return model


def dit() -> nn.Module:
    """A transformer of two layers over patches of 2x2 pixels."""
    model: nn.Module = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=CHANNELS,
        num_layers=2,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    return model


# Each model with the names of the layers that are adapted.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "unet": (unet, ["conv_in", "conv1", "conv2", "conv_shortcut", "to_q", "to_k", "to_v", "class_embedding"]),
    "dit": (
        dit,
        ["pos_embed.proj", "to_q", "to_k", "to_v", "ff.net.0.proj", "class_embedder.embedding_table"],
    ),
}


def striped(count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 16, 16) of horizontal (class 0) or vertical stripes (class 1), and their classes."""
    classes = torch.randint(CLASSES, (count,))
    stripes = (torch.arange(SIZE) + torch.randint(4, (count, 1))).div(2).floor().remainder(2) * 2 - 1
    rows, columns = (stripes.view(count, 1, *shape) for shape in ((SIZE, 1), (1, SIZE)))
    images = torch.where(classes.view(-1, 1, 1, 1) == 0, rows, columns)
    return images.expand(-1, CHANNELS, SIZE, SIZE), classes


def main(name: str, folder: Path, steps: int) -> tuple[list[float], float]:
    """Train an adapter and merge the saved one; return the losses, and how far the merged model's output is off."""
    make, targets = MODELS[name]
    torch.manual_seed(0)
    base = make()
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, SMoAConfig(r=8, num_blocks=2, use_lora_rate=True, target_modules=targets))
    model.print_trainable_parameters()

    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for step in range(steps):
        images, classes = striped(16)
        noise, times = torch.randn_like(images), torch.randint(1000, (len(images),))
        noisy = scheduler.add_noise(images, noise, times)
        loss = F.mse_loss(model(noisy, timestep=times, class_labels=classes).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    model.save_pretrained(str(folder))  # a small folder of safetensors
    fresh = make()
    fresh.load_state_dict(weights)
    merged = PeftModel.from_pretrained(fresh, str(folder)).merge_and_unload().eval()  # a plain model again
    with torch.no_grad():
        trained = model.eval()(noisy, timestep=times, class_labels=classes).sample
        error = (merged(noisy, timestep=times, class_labels=classes).sample - trained).abs().max().item()
    print(f"adapter in {folder}; the merged model's output differs from the adapted one's by {error:.0e}")
    return losses, error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="unet")
    parser.add_argument("--folder", type=Path, default=Path("runs/diffusion"))
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    main(options.model, options.folder, options.steps)
