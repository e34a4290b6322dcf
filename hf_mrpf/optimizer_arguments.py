"""Arguments of the optimizer as a text (`optim_args`), in which nothing that is not understood is passed over."""

from typing import Any

from transformers import TrainingArguments

SGD_ARGUMENTS = "momentum=0.9,nesterov=true"
SWITCHES = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def check_sgd_arguments(optim_args: str | None) -> None:
    """
    Refuse (ValueError) `optim_args` that are none of SGD's: transformers passes over a name that it does not know, and
    over a weight decay, which is a setting of each group of parameters.
    """
    options: dict[str, float | bool] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
    _changed(options, optim_args, "sgd", "momentum and dampening", SGD_ARGUMENTS)


def adam_arguments(args: TrainingArguments) -> dict[str, Any]:
    """
    Keywords of `torch.optim.Adam`: those of `TrainingArguments`, and what `optim_args` change of them.

    Raises:
        ValueError: where `optim_args` are not pairs such as `"beta2=0.99,amsgrad=true"`, or name anything else.
    """
    options: dict[str, float | bool] = {
        "beta1": args.adam_beta1,
        "beta2": args.adam_beta2,
        "eps": args.adam_epsilon,
        "amsgrad": False,
    }
    options = _changed(options, args.optim_args, "adam", "beta1, beta2 and eps", "beta2=0.99,amsgrad=true")
    betas = (options.pop("beta1"), options.pop("beta2"))
    return {"lr": args.learning_rate, "betas": betas, **options}


def _changed(
    options: dict[str, float | bool], optim_args: str | None, optim: str, numbers: str, example: str
) -> dict[str, float | bool]:
    """`options` of an optimizer with what `optim_args` change of them, or a ValueError that says what it takes."""
    changed = dict(options)
    try:
        for pair in optim_args.replace(" ", "").split(",") if optim_args else []:
            name, value = pair.split("=")
            changed[name] = SWITCHES[value.lower()] if isinstance(options[name], bool) else float(value)
    except (KeyError, ValueError) as error:
        switch = next(name for name, value in options.items() if isinstance(value, bool))
        raise ValueError(
            f"optim_args={optim_args!r} do not fit optim {optim!r}, which takes {numbers} (numbers) and {switch} (true "
            f"or false), as in {example}; weight decay is an option of its own."
        ) from error
    return changed
