"""The network alone: tensors in, tensors out."""

from torch import Tensor, nn


class ConvNet(nn.Sequential):
    """Two convolutions with pooling, and a linear layer: about 21,000 weights at width 32.

    Args:
        num_classes: Length of the output.
        width: Channels of the first convolution; the second has twice as many.
        dropout: Share of the features that is dropped before the linear layer.
    """

    def __init__(self, num_classes: int, width: int = 32, dropout: float = 0.25) -> None:
        super().__init__(
            nn.Conv2d(1, width, kernel_size=3, padding=1),  # (B, width, 8, 8)
            nn.ReLU(),
            nn.MaxPool2d(2),  # (B, width, 4, 4)
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),  # (B, 2 width, 4, 4)
            nn.ReLU(),
            nn.MaxPool2d(2),  # (B, 2 width, 2, 2)
            nn.Flatten(),  # (B, 8 width)
            nn.Dropout(dropout),
            nn.Linear(8 * width, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, 1, 8, 8) to logits (B, num_classes)."""
        return super().forward(images)
