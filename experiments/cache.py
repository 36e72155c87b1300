"""`--teacher-cache`: a frozen teacher need not encode the same image twice."""
import dataclasses
import hashlib

import torch

import models


class EncodeOnce:
    """A frozen teacher's `encode` that keeps what it computes: each padded image is encoded once.

    Worth its room where images are few and augmentation only flips them. Images are encoded one by
    one, so that beyond its padding a memory does not depend on the batch, not even in rounding.

    encode: the teacher's own.  room: bytes to fill; images that come later are encoded each time.
    """
    def __init__(self, encode, room):
        self.encode, self.room = encode, room
        self.memories, self.positions = {}, {}

    def __call__(self, images, padding):
        """images (B, 3, H, W), padding (B, H, W) -> models.Memory of the batch."""
        pairs = zip(images.split(1), padding.split(1))
        single = [self.of_one(image, mask) for image, mask in pairs]
        tensors = ((m.tokens, m.padding, m.valid_ratios, m.position) for m in single)
        tokens, padding, valid_ratios, position = map(torch.cat, zip(*tensors))
        return models.Memory(tokens, padding, single[0].shapes, valid_ratios, position)

    def of_one(self, image, padding):
        """The memory of one image, padded as its batch needs it."""
        outline = key_of(padding)
        # Under autocast a memory has other numbers.
        name = outline, key_of(image), torch.is_autocast_enabled(image.device.type)
        if name in self.memories:
            return self.memories[name]
        memory = self.encode(image, padding)
        # Positions follow from the padding, so images that are padded alike share them.
        new = memory.tokens.nbytes
        if outline not in self.positions:
            new += memory.position.nbytes
        if new <= self.room:
            self.room -= new
            position = self.positions.setdefault(outline, memory.position)
            self.memories[name] = dataclasses.replace(memory, position=position)
        return memory


def key_of(tensor):
    """A short name for a tensor's shape and numbers."""
    numbers = tensor.cpu().contiguous().numpy()
    return tuple(tensor.shape), hashlib.blake2b(numbers, digest_size=16).digest()
