"""What does a plain PyTorch loop in float64 make of ten alternating steps? Records this folder.

A single-scale tokenizer and a patch discriminator, small and with random weights, train as LlamaGen
specification 1.5-1.7 says: adaptive weight, the discriminator from step 4 on, entropy of the codes,
clipped gradients, Adam. Names of tensors are the published ones.

python tests/golden/competition/make.py    (torch 2.13.0)
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn
from torch.nn import functional

HERE = Path(__file__).parent
STEPS, BATCH, SIDE = 10, 2, 16
WIDTHS, GROUPS, LATENT, CODES, CHANNELS = (4, 8), 2, 6, 16, 4
COMMITMENT, ENTROPY, TEMPERATURE = 0.25, 0.1, 0.01
ADVERSARIAL, START = 0.5, 4
RATE, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0


def norm(width):
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


class Res(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, 'nin_shortcut') else x)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (part(h).flatten(2) for part in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k * x.shape[1] ** -0.5, dim=-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Resampled(nn.Module):
    def __init__(self, width, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x):
        if self.down:
            return self.conv(functional.pad(x, (0, 1, 0, 1)))
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode='nearest'))


class Level(nn.Module):
    """One block in the encoder, two in the decoder; attention at the lowest resolution."""

    def __init__(self, inputs, outputs, blocks, attention, resampled, down):
        super().__init__()
        widths = [inputs] + [outputs] * blocks
        self.res = nn.ModuleList(Res(*widths[i : i + 2]) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(outputs) for _ in range(blocks if attention else 0))
        if resampled:
            setattr(self, 'downsample' if down else 'upsample', Resampled(outputs, down))

    def forward(self, x):
        for number, block in enumerate(self.res):
            x = block(x)
            x = self.attn[number](x) if len(self.attn) else x
        for name in ('downsample', 'upsample'):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Half(nn.Module):
    """The encoder, or the decoder."""

    def __init__(self, inputs, outputs, down):
        super().__init__()
        low, high = WIDTHS[-1], WIDTHS[0]
        first, last = (high, low) if down else (low, high)
        self.down = down
        self.conv_in = nn.Conv2d(inputs, first, 3, padding=1)
        self.mid = nn.ModuleList([Res(low, low), Attention(low), Res(low, low)])
        if down:
            levels = ((high, high, 1, False, True), (high, low, 1, True, False))
        else:
            levels = ((low, low, 2, True, True), (low, high, 2, False, False))
        self.conv_blocks = nn.ModuleList(Level(*level, down) for level in levels)
        self.norm_out = norm(last)
        self.conv_out = nn.Conv2d(last, outputs, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for part in [*self.conv_blocks, *self.mid] if self.down else [*self.mid, *self.conv_blocks]:
            x = part(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class Quantiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CODES, CHANNELS)

    def forward(self, x):
        z = functional.normalize(x.movedim(1, -1), dim=-1)
        vectors = functional.normalize(self.embedding.weight, dim=-1)
        distances = (z.unsqueeze(-2) - vectors).square().sum(-1).flatten(0, -2)
        chosen = vectors[distances.argmin(-1)].view_as(z)
        logs = torch.log_softmax(-distances / TEMPERATURE, dim=-1)
        mean = logs.exp().mean(0)
        per_sample = -(logs.exp() * logs).sum(-1).mean()
        entropy = per_sample + (mean * torch.log(mean + 1e-5)).sum()
        codebook = (chosen - z.detach()).square().mean()
        commitment = (chosen.detach() - z).square().mean()
        loss = codebook + COMMITMENT * commitment + ENTROPY * entropy
        return (z + (chosen - z).detach()).movedim(-1, 1), loss


class Tokenizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Half(3, LATENT, True), Half(LATENT, 3, False)
        self.quant_conv = nn.Conv2d(LATENT, CHANNELS, 1)
        self.post_quant_conv = nn.Conv2d(CHANNELS, LATENT, 1)
        self.quantize = Quantiser()

    def forward(self, images):
        quantised, loss = self.quantize(self.quant_conv(self.encoder(images)))
        return self.decoder(self.post_quant_conv(quantised)), loss


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 4, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8, 16, 4, 1, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 1, 4, 1, 1),
        )

    def forward(self, images):
        return self.main(images)


def fill(network, random):
    """Random parameters, none of which is zero."""
    for parameter in network.parameters():
        shape = tuple(parameter.shape)
        if len(shape) > 1:
            value = random.normal(size=shape) * np.prod(shape[1:]) ** -0.5
        else:
            value = 1 + 0.15 * random.normal(size=shape)
        parameter.data = torch.from_numpy(value)


def state(when, tokenizer, discriminator):
    named = {'tokenizer': tokenizer.state_dict(), 'discriminator': discriminator.state_dict()}
    return {
        f'{when}.{network}.{name}': tensor.numpy().copy()
        for network, tensors in named.items()
        for name, tensor in tensors.items()
        if not name.endswith('num_batches_tracked')
    }


def main():
    torch.set_default_dtype(torch.float64)
    random = np.random.default_rng(0)
    tokenizer, discriminator = Tokenizer(), Discriminator()
    fill(tokenizer, random)
    fill(discriminator, random)
    bytes_NBHWc = random.integers(0, 256, (STEPS, BATCH, SIDE, SIDE, 3), np.uint8)
    recorded = {'images': bytes_NBHWc} | state('before', tokenizer, discriminator)
    networks = (tokenizer, discriminator)
    optimizers = [torch.optim.Adam(each.parameters(), lr=RATE, betas=BETAS) for each in networks]

    def update(which, loss):
        optimizers[which].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks[which].parameters(), CLIP)
        optimizers[which].step()

    losses = []
    for step, images in enumerate(bytes_NBHWc, 1):
        weight = ADVERSARIAL if step >= START else 0.0
        x = torch.from_numpy(images).double().movedim(-1, 1) / 127.5 - 1
        decoded, of_codes = tokenizer(x)
        pixels, adversarial = (decoded - x).square().mean(), -discriminator(decoded).mean()
        kernel = tokenizer.decoder.conv_out.weight
        lengths = [
            torch.autograd.grad(loss, kernel, retain_graph=True)[0].norm()
            for loss in (pixels, adversarial)
        ]
        adaptive = (lengths[0] / (lengths[1] + 1e-4)).clamp(0, 1e4).detach()
        loss = pixels + adaptive * weight * adversarial + of_codes
        update(0, loss)
        real, fake = discriminator(x), discriminator(decoded.detach())
        hinge = 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())
        update(1, weight * hinge)
        losses.append([value.item() for value in (loss, adversarial, adaptive, weight * hinge)])
    recorded |= state('after', tokenizer, discriminator) | {'losses': np.array(losses)}
    save_file(recorded, HERE / 'steps.safetensors')


if __name__ == '__main__':
    main()
