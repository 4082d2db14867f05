"""Recipes: what is to be made, as typed settings. `Compute` is apart: how it is made, never part of an identity.

`settings.py` has one class a stage, `reading.py` makes a `Recipe` of a YAML file, `dialect.py` is the YAML.
"""

from miniplm.recipe.reading import load as load
from miniplm.recipe.reading import parse as parse
from miniplm.recipe.settings import Columns as Columns
from miniplm.recipe.settings import Compute as Compute
from miniplm.recipe.settings import CorpusSettings as CorpusSettings
from miniplm.recipe.settings import Counted as Counted
from miniplm.recipe.settings import Documents as Documents
from miniplm.recipe.settings import EvaluateSettings as EvaluateSettings
from miniplm.recipe.settings import GivenModel as GivenModel
from miniplm.recipe.settings import Precision as Precision
from miniplm.recipe.settings import PrepareSettings as PrepareSettings
from miniplm.recipe.settings import ProxySettings as ProxySettings
from miniplm.recipe.settings import RaySettings as RaySettings
from miniplm.recipe.settings import Recipe as Recipe
from miniplm.recipe.settings import SamplerSettings as SamplerSettings
from miniplm.recipe.settings import ScoredModel as ScoredModel
from miniplm.recipe.settings import ScoreSettings as ScoreSettings
from miniplm.recipe.settings import ServerModel as ServerModel
from miniplm.recipe.settings import Settings as Settings
from miniplm.recipe.settings import Split as Split
from miniplm.recipe.settings import StudentSettings as StudentSettings
from miniplm.recipe.settings import TokenizerSettings as TokenizerSettings
from miniplm.recipe.settings import TokenizerTraining as TokenizerTraining
from miniplm.recipe.settings import TrainSettings as TrainSettings
from miniplm.recipe.settings import VllmModel as VllmModel
