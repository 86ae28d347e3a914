"""The sizes of the variables of real models."""


def resnet50_sizes() -> list[int]:
    """Returns the sizes of the trainable variables of keras.applications.ResNet50: 214, with 25,583,592 values."""

    def layer(kernel: int, inputs: int, outputs: int) -> list[int]:
        return [kernel * kernel * inputs * outputs, outputs, outputs, outputs]  # kernel, bias, gamma, beta

    sizes = layer(7, 3, 64)
    inputs = 64
    for blocks, filters in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            sizes += layer(1, inputs, filters) + layer(3, filters, filters)
            if block == 0:
                sizes += layer(1, inputs, 4 * filters)
            sizes += layer(1, filters, 4 * filters)
            inputs = 4 * filters
    return [*sizes, 2048 * 1000, 1000]


def gpt2_xl_sizes() -> list[int]:
    """Returns the sizes of GPT-2 XL's parameters: 580, with 1,557,611,200 values."""
    width = 1600
    block = [width, width]
    for inputs, outputs in ((1, 3), (1, 1)):
        block += [inputs * outputs * width * width, outputs * width]
    block += [width, width]
    for inputs, outputs in ((1, 4), (4, 1)):
        block += [inputs * outputs * width * width, outputs * width]
    return [50257 * width, 1024 * width, *(block * 48), width, width]
