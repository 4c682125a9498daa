"""Whatever involves more than one rank."""

import logging
import warnings

from ltrain.kernels.libraries import load_cudnn

# megatron-core announces on import which optional packages are missing, and warns of options of its own that ltrain does not use
warnings.filterwarnings("ignore", module=r".*megatron[./]core")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
load_cudnn()  # megatron-core imports Transformer Engine where there is one
