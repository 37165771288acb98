"""VLMo as Hugging Face transformers models: configuration and task heads around `vlmo_fast.MoMETransformer`."""
