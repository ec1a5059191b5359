"""Words by which a message names an argument."""

# Where an exception need not name the argument itself: the words that name it instead.
ALIASES = {
    "data": ("data", "x ", "batch", "stream", "plot takes", "frame", "Column", "column", "MLP", "layers"),
    "model": ("model", "ayer"),
    "images": ("mages", "image", "data"), "learning_rate": ("update_to_weight",), "correlation": ("samples",),
    "frame": ("frame", "olumn"), "prediction": ("prediction", "frame", "olumn"), "metrics": ("frame", "plot", "curve"),
    "rows": ("frame", "olumn"), "weight": ("weight",), "columns": ("olumn",), "a": ("qm_norm", "a "),
    "value": ("value", "mantissa", "olumn"), "targets": ("sinks",), "given": ("activation",),
    "operator": ("qm_norm", "operator"), "activation": ("activation", "lambda", "slope", "weight variance"),
    "hue": ("olumn",),
    "forward": ("forward", "model returned", "data", "ayer", "nonlinearity"), "loss_fn": ("loss",),
    "values": ("values", "pre-activations", "olumn"), "matvec": ("product", "matvec"), "rmatvec": ("product",),
    "function": ("function", "expectation"), "first": ("first", "expectation"), "second": ("second", "expectation"),
    "models": ("factory", "models"), "monitor": ("frame", "monitor", "olumn"), "layers": ("layer",),
    "target": ("layer", "target"), "source": ("layer", "source"), "growth": ("growth", "frame", "olumn"),
    "theory": ("theory", "frame", "olumn"), "diagram": ("diagram",), "points": ("points", "plot", "frame", "olumn"),
    "predicted": ("predicted", "frame", "olumn"), "q": ("q ", "lengths", "Lengths", "samples", "length", "expectation"),
    "start": ("start", "Lengths"), "path": ("saved as", "read from"), "style": ("olumn",),
    "quantity": ("quantity", "olumn"), "quantities": ("quantit", "olumn"), "kinks": ("kinks",),
    "scale": ("scale", "standard deviation"), "probes": ("probes", "Probes"), "weight_variance": ("weight_variance",
    "mean square", "Lengths", "length"),
    "module": ("model", "module", "images"), "index": ("olumn", "index"),
    "stderr": ("olumn", "stderr"), "layer": ("olumn", "layer"), "keys": ("keys", "olumn"),
}  # fmt: skip
