"""Where records of a monitor go: TensorBoard, MLflow, and trackers such as wandb and trackio."""

from gradscope.sinks.delivery import Sinks, SinkWarning, values_of
from gradscope.sinks.files import MLflow, TensorBoard

__all__ = ["MLflow", "SinkWarning", "Sinks", "TensorBoard", "values_of"]
