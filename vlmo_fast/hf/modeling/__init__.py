"""VLMo's tasks as transformers models, a file for each; each model holds its `MoMETransformer` as `.backbone`."""

from vlmo_fast.hf.modeling.base import VLMoModel, VLMoModelOutput, VLMoPreTrainedModel
from vlmo_fast.hf.modeling.image_classification import VLMoForImageClassification
from vlmo_fast.hf.modeling.images_and_text import VLMoForImagesAndTextClassification
from vlmo_fast.hf.modeling.masked_image import VLMoForMaskedImageModeling
from vlmo_fast.hf.modeling.masked_lm import VLMoForMaskedLM
from vlmo_fast.hf.modeling.pretraining import VLMoForPreTraining, VLMoPreTrainingOutput
from vlmo_fast.hf.modeling.question_answering import VLMoForQuestionAnswering
from vlmo_fast.hf.modeling.retrieval import VLMoForImageTextRetrieval, VLMoImageTextRetrievalOutput

__all__ = [
    "VLMoForImageClassification",
    "VLMoForImageTextRetrieval",
    "VLMoForImagesAndTextClassification",
    "VLMoForMaskedImageModeling",
    "VLMoForMaskedLM",
    "VLMoForPreTraining",
    "VLMoForQuestionAnswering",
    "VLMoImageTextRetrievalOutput",
    "VLMoModel",
    "VLMoModelOutput",
    "VLMoPreTrainedModel",
    "VLMoPreTrainingOutput",
]
