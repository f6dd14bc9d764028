"""The model that a command's flags ask for."""

from dataclasses import asdict

from funcattrib.loading import Loaded, load_model
from funcattrib.recipes.config import ModelConfig


def load_from(config: ModelConfig) -> Loaded:
    """Load the model of ``config``."""
    settings = asdict(config)
    return load_model(settings.pop("model"), **settings)
