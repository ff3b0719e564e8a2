"""Optimizers of models whose variables are replaced."""

import keras


def renewed(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Give an optimizer with the same settings that has not trained anything yet.

    What `exclude_from_weight_decay` was told by name goes along; the config does not say so.
    """
    new = type(optimizer).from_config(optimizer.get_config())
    names = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)  # there once it has been told
    if names is not None:
        new.exclude_from_weight_decay(var_names=[names.pattern])
    return new


def check_optimizer(optimizer: keras.optimizers.Optimizer | None, variables: list) -> None:
    """Raise a ValueError for an optimizer that was built before some of the variables that it is to train."""
    if optimizer is None or not optimizer.built:
        return
    known = set(map(id, optimizer._trainable_variables))
    unknown = [variable.path for variable in variables if id(variable) not in known]
    if unknown:
        raise ValueError(
            f"the optimizer does not know {unknown[:3]}, {len(unknown)} variables in all, which came after it was "
            "built; expected one that does. Call compile() after enable_lora, and after making layers trainable."
        )
