"""Names and versions of a config that others ask for."""

QUANT_METHOD = "hf_blr"
#: bump when a checkpoint written before cannot be read as it is
FORMAT_VERSION = 1

#: the structure that stands for the best one for each layer
AUTO = "auto"
ALLOCATIONS = ("loss", "uniform")
#: what an override says of a layer's sizes
SIZE_KEYS = ("structure", "ratio", "rank", "num_blocks")
