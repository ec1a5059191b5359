"""Per-layer statistics, one small frozen dataclass each: fields are the configuration, calls are pure."""

from gradscope.measures.activation import PreactivationStd, SignDiversity

__all__ = ["PreactivationStd", "SignDiversity"]
