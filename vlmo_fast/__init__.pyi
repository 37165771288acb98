# The public names, listed once: type checkers read this file, and `__init__.py` imports from where it says.

from . import config as config
from . import data as data
from . import distributed as distributed
from . import export as export
from . import formats as formats
from . import hf as hf
from . import losses as losses
from . import model as model
from . import nn as nn
from . import ops as ops
from . import outputs as outputs
from . import packing as packing
from . import positions as positions
from . import serving as serving
from . import training as training
from .config import MoMEConfig as MoMEConfig
from .formats.beit import load_beit as load_beit
from .formats.bert import load_bert_embeddings as load_bert_embeddings
from .formats.loading import load as load
from .formats.official import load_official as load_official
from .formats.official import save_official as save_official
from .hf.configuration import VLMoConfig as VLMoConfig
from .hf.modeling import VLMoForImageClassification as VLMoForImageClassification
from .hf.modeling import VLMoForImagesAndTextClassification as VLMoForImagesAndTextClassification
from .hf.modeling import VLMoForImageTextRetrieval as VLMoForImageTextRetrieval
from .hf.modeling import VLMoForMaskedImageModeling as VLMoForMaskedImageModeling
from .hf.modeling import VLMoForMaskedLM as VLMoForMaskedLM
from .hf.modeling import VLMoForPreTraining as VLMoForPreTraining
from .hf.modeling import VLMoForQuestionAnswering as VLMoForQuestionAnswering
from .hf.modeling import VLMoModel as VLMoModel
from .hf.processing import VLMoImageProcessor as VLMoImageProcessor
from .hf.processing import VLMoProcessor as VLMoProcessor
from .model import MoMETransformer as MoMETransformer
from .outputs import MoMEOutput as MoMEOutput
from .outputs import PackedOutput as PackedOutput
from .packing import PackedLayout as PackedLayout
from .packing import pack as pack

__version__: str
