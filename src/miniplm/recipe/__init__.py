"""Recipes: what is to be made, as typed settings. `Compute` is apart: how it is made, never part of an identity.

`settings.py` has one class a stage, `training.py` those of models and of what students learn from, `reading.py` makes
a `Recipe` of a YAML file, `dialect.py` is the YAML.
"""

from miniplm.recipe.base import Counted as Counted
from miniplm.recipe.base import Documents as Documents
from miniplm.recipe.base import Precision as Precision
from miniplm.recipe.base import Settings as Settings
from miniplm.recipe.reading import Study as Study
from miniplm.recipe.reading import Variant as Variant
from miniplm.recipe.reading import load as load
from miniplm.recipe.reading import load_study as load_study
from miniplm.recipe.reading import parse as parse
from miniplm.recipe.reading import parse_study as parse_study
from miniplm.recipe.reading import recipes_of as recipes_of
from miniplm.recipe.settings import Columns as Columns
from miniplm.recipe.settings import Compute as Compute
from miniplm.recipe.settings import CorpusSettings as CorpusSettings
from miniplm.recipe.settings import DocumentSetSettings as DocumentSetSettings
from miniplm.recipe.settings import EvaluateSettings as EvaluateSettings
from miniplm.recipe.settings import PrepareSettings as PrepareSettings
from miniplm.recipe.settings import ProxySettings as ProxySettings
from miniplm.recipe.settings import RaySettings as RaySettings
from miniplm.recipe.settings import Recipe as Recipe
from miniplm.recipe.settings import SamplerSettings as SamplerSettings
from miniplm.recipe.settings import ScoreSettings as ScoreSettings
from miniplm.recipe.settings import Split as Split
from miniplm.recipe.settings import TaskSettings as TaskSettings
from miniplm.recipe.training import GenerateSettings as GenerateSettings
from miniplm.recipe.training import GivenModel as GivenModel
from miniplm.recipe.training import MiniLLMSettings as MiniLLMSettings
from miniplm.recipe.training import NextTokenSettings as NextTokenSettings
from miniplm.recipe.training import ObjectiveSettings as ObjectiveSettings
from miniplm.recipe.training import OwnObjective as OwnObjective
from miniplm.recipe.training import RetokenizeSettings as RetokenizeSettings
from miniplm.recipe.training import ScoredModel as ScoredModel
from miniplm.recipe.training import ServerModel as ServerModel
from miniplm.recipe.training import StudentSettings as StudentSettings
from miniplm.recipe.training import TokenizerSettings as TokenizerSettings
from miniplm.recipe.training import TokenizerTraining as TokenizerTraining
from miniplm.recipe.training import TrainSettings as TrainSettings
from miniplm.recipe.training import VanillaKDSettings as VanillaKDSettings
from miniplm.recipe.training import VllmModel as VllmModel
