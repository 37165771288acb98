"""VLMo as Hugging Face transformers models: configuration, task heads around `vlmo_fast.MoMETransformer`, processor.

Importing this makes transformers' Auto classes know VLMo; `AutoModelForZeroShotImageClassification` gives the dual
encoder.
"""

try:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForMaskedImageModeling,
        AutoModelForMaskedLM,
        AutoModelForPreTraining,
        AutoModelForVisualQuestionAnswering,
        AutoModelForZeroShotImageClassification,
        AutoProcessor,
        AutoTokenizer,
        BertTokenizer,
    )
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    from vlmo_fast.requirements import missing

    raise missing("vlmo_fast.hf", "transformers") from error

from vlmo_fast.hf import modeling, processing
from vlmo_fast.hf.configuration import VLMoConfig

_MODELS = {
    AutoModel: modeling.VLMoModel,
    AutoModelForPreTraining: modeling.VLMoForPreTraining,
    AutoModelForMaskedLM: modeling.VLMoForMaskedLM,
    AutoModelForMaskedImageModeling: modeling.VLMoForMaskedImageModeling,
    AutoModelForZeroShotImageClassification: modeling.VLMoForImageTextRetrieval,
    AutoModelForVisualQuestionAnswering: modeling.VLMoForQuestionAnswering,
    AutoModelForImageClassification: modeling.VLMoForImageClassification,
}

AutoConfig.register(VLMoConfig.model_type, VLMoConfig)
for _auto_class, _model_class in _MODELS.items():
    _auto_class.register(VLMoConfig, _model_class)
AutoTokenizer.register(VLMoConfig, BertTokenizer)
AutoImageProcessor.register(VLMoConfig, image_processor_classes={"pil": processing.VLMoImageProcessor})
AutoProcessor.register(VLMoConfig, processing.VLMoProcessor)

IS_REGISTERED = True  # vlmo_fast._autoclasses looks here
