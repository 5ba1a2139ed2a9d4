"""ViT: its patches, its loss, errors."""

import pytest
import torch
from bounds import assert_within_bound
from model_cases import CLASSES, IMAGES, randomize, vit
from torch.nn import functional

from fusedformer import ViTConfig


def model(**changes):
    return randomize(vit(**changes)).eval()


def test_patches_are_a_convolution():
    """Cutting into patches and one linear layer: a convolution with a stride of its size."""
    net = model()
    weight, bias = net.patch_embedding.weight, net.patch_embedding.bias

    def convolved():
        kernel = weight.view(32, 2, 4, 4).to(images.dtype)
        return functional.conv2d(images, kernel, bias.to(images.dtype), stride=4).flatten(2).mT

    images = IMAGES
    eager = convolved()
    images = IMAGES.double()
    found = net.patch_embedding(net.patches(IMAGES))
    assert_within_bound("patches", found, eager, convolved())


def test_patches_are_read_row_by_row():
    image = torch.arange(2 * 12 * 12.0).view(1, 2, 12, 12)
    patches = model().patches(image)
    assert patches.shape == (1, 9, 2 * 4 * 4)
    assert torch.equal(patches[0, 5], image[0, :, 4:8, 8:12].flatten())


def test_every_patch_counts():
    net = model()
    for row in range(3):
        other = IMAGES.clone()
        other[:, :, 4 * row : 4 * row + 4, :4] += 1
        assert (net(IMAGES) != net(other)).all()


def test_position_embeddings_tell_patches_apart():
    """Without them, patches that change places change nothing but the order of sums."""
    net = model().double()
    images = IMAGES.double()
    swapped = torch.cat((images[:, :, 4:8], images[:, :, :4], images[:, :, 8:]), 2)
    told = (net(images) - net(swapped)).abs().min()
    torch.nn.init.zeros_(net.position_embedding)
    assert (net(images) - net(swapped)).abs().max() < 1e-6 * told


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss(smoothing):
    net = model()

    def plain(logits):
        return functional.cross_entropy(logits, CLASSES, label_smoothing=smoothing)

    eager, truth = plain(net(IMAGES)), plain(net.double()(IMAGES.double()))
    found = net.float().loss(IMAGES, CLASSES, label_smoothing=smoothing)
    assert_within_bound("loss", found, eager, truth)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (IMAGES[0], ValueError, r"ViT: images must be \(batch, 2, 12, 12\); got \(2, 12, 12\)"),
        (IMAGES[..., :8], ValueError, r"ViT: images must be .*; got \(3, 2, 12, 8\)"),
        (IMAGES.byte(), TypeError, "ViT: images must be float32.*; got torch.uint8"),
    ],
)
def test_errors(images, error, message):
    with pytest.raises(error, match=message):
        vit()(images)


def test_errors_of_the_configuration():
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size; got 30"):
        ViTConfig(image_size=30)
