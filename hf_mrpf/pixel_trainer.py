"""A Trainer of images: columns of images become pixels, which cross to the device in bytes."""

import copy
import logging
from collections.abc import Mapping
from typing import Any, cast

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length

from .batchnorm import has_batchnorm
from .calibration import number_of_classes
from .class_names import check_class_names, model_class_names
from .config import MRPFConfig
from .loader import PixelRows, as_float, batches, collate_pixels, with_index
from .pixels import as_pixel_dataset, is_packed, own_class_names
from .publishing import PublishingTrainer

LOGGER = logging.getLogger("hf_mrpf")
RENUMBER = (
    "it would be trained to misname them. Number the labels as the model does, by "
    "dataset.align_labels_with_mapping(model.config.label2id, column), or build the model with "
    "id2label=dict(enumerate(names of the data set))."
)
NUMBER_ALIKE = (
    "it has no names of its own, and learns those of the training images. Number the labels as there, by "
    "dataset.align_labels_with_mapping({name: number for number, name in enumerate(names)}, column)."
)


class PixelTrainer(PublishingTrainer):
    """`Trainer` of data sets with an Image (or `pixel_values`) and a ClassLabel column, with `Trainer`'s arguments."""

    args: MRPFConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: MRPFConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        **kwargs: Any,
    ):
        self._image_size = getattr(getattr(model, "config", None), "image_size", None)
        self._num_labels = getattr(getattr(model, "config", None), "num_labels", None)
        self._class_names = model_class_names(model)
        if isinstance(train_dataset, Mapping):
            splits = ", ".join(map(str, train_dataset))
            raise ValueError(
                f"train_dataset holds several splits ({splits}); hand over one of them, such as ['train']."
            )
        with args.main_process_first(desc="decoding of images"):  # the others find them in the cache
            train_dataset = self._adopted(model, train_dataset)
            if isinstance(eval_dataset, dict):
                args = _picking_by_split(args, list(eval_dataset))
                eval_dataset = {name: self._indexed(split) for name, split in eval_dataset.items()}
            else:
                eval_dataset = self._indexed(eval_dataset)
        kwargs = {"data_collator": collate_pixels} | kwargs
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self._adopted_images = self.train_dataset

    def _adopted(self, model: nn.Module, dataset: Any) -> Any:
        """Training images as pixels, once their classes are known to be those of the model."""
        dataset = self._pixels(dataset)
        if isinstance(dataset, Dataset):
            self._class_names = self._class_names or _name_classes(model, dataset)
            if self._num_labels is None:
                _check_classes(model, dataset)
        return dataset

    def _adopt_training_images(self) -> bool:
        """Whether the user had put another data set in place of the one that the trainer knew: it is known now."""
        if self.train_dataset is self._adopted_images:
            return False
        model = self.accelerator.unwrap_model(self.model)
        self.train_dataset = self._adopted_images = self._adopted(model, self.train_dataset)
        return True

    def _pixels(self, dataset: Any) -> Any:
        if not isinstance(dataset, Dataset):
            return dataset
        pixels = as_pixel_dataset(dataset, self._image_size)
        classes = getattr(pixels.features["labels"], "num_classes", None)
        if classes is None:
            return pixels
        if self._num_labels is not None:
            # Integers without names tell of no class above the highest one that occurs.
            fits = classes == self._num_labels if own_class_names(pixels) else classes <= self._num_labels
            if not fits:
                raise ValueError(
                    f"The data set has {classes} classes and the model {self._num_labels}; "
                    f"build the model with num_labels={classes}."
                )
        advice = NUMBER_ALIKE if self._num_labels is None else RENUMBER
        check_class_names(self._class_names, own_class_names(pixels), advice)
        return pixels

    def _indexed(self, dataset: Any) -> Any:
        """Pixels with the index of each image, which keys its random start in the attack."""
        if not isinstance(dataset, Dataset) or ("index" in dataset.column_names and is_packed(dataset)):
            return dataset
        return with_index(self._pixels(dataset))

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        # A collator of the user's expects rows.
        if isinstance(dataset, Dataset) and self.data_collator is collate_pixels:
            dataset = PixelRows(dataset)
        given = self.args.dataloader_drop_last
        # Evaluations count every image.
        self.args.dataloader_drop_last = description == "Training" and (given or self._leaves_a_single_image())
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.args.dataloader_drop_last = given

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if (pixels := inputs.get("pixel_values")) is not None and not pixels.is_floating_point():
            inputs = {**inputs, "pixel_values": as_float(pixels)}  # bytes have crossed to the device
        return inputs

    def get_train_dataloader(self):
        """As in `Trainer`; a last batch of a single image is left out where the model has BatchNorm."""
        self._adopt_training_images()
        images, batch = self.train_dataset, self._train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and has_length(images) and len(cast(Dataset, images)) < batch:
            raise ValueError(
                f"dataloader_drop_last leaves out a batch that is not full, and {len(cast(Dataset, images))} training "
                f"images are fewer than one of {batch}: lower per_device_train_batch_size, or leave it out."
            )
        if not self.args.dataloader_drop_last and self._leaves_a_single_image() and self.is_world_process_zero():
            LOGGER.warning(
                "The last batch of an epoch, a single image, is left out: BatchNorm cannot train on one. Another "
                "per_device_train_batch_size than %d would use it.",
                self.args.per_device_train_batch_size,
            )
        return super().get_train_dataloader()

    def _leaves_a_single_image(self) -> bool:
        dataset: Any = self.train_dataset
        if not has_length(dataset) or not has_batchnorm(self.accelerator.unwrap_model(self.model)):
            return False
        filled_up = self.args.world_size > 1 and self.accelerator.even_batches
        return len(dataset) > self._train_batch_size and len(dataset) % self._train_batch_size == 1 and not filled_up

    def get_eval_dataloader(self, eval_dataset=None):
        """As in `Trainer`, with raw image columns decoded."""
        return super().get_eval_dataloader(self._indexed(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        """As in `Trainer`, with raw image columns decoded."""
        return super().get_test_dataloader(self._indexed(test_dataset))


def _name_classes(model: nn.Module, dataset: Dataset) -> list[str] | None:
    """Gives the config of a model that has no names of its classes those of the data set that it is trained on."""
    config: Any = getattr(model, "config", None)
    names = own_class_names(dataset)
    if names is not None and len(names) == getattr(config, "num_labels", None):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
    return model_class_names(model) or names


def _picking_by_split(args: MRPFConfig, splits: list[str]) -> MRPFConfig:
    """With several validation splits a metric is that of one of them; the default asks for no best epoch then."""
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    if args.metric_for_best_model is None or metric.startswith(tuple(f"{split}_" for split in splits)):
        return args
    if args.load_best_model_at_end:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} with several validation splits: say of which, such "
            f"as {f'{splits[0]}_{metric}'!r}."
        )
    args = copy.copy(args)
    args.metric_for_best_model = None
    return args


def _check_classes(model: nn.Module, dataset: Dataset) -> None:
    """Refuses a network with fewer outputs than the data set has classes, before it fails in mid-training."""
    images, _ = next(iter(batches(dataset, 1)))
    outputs = number_of_classes(model, images)
    classes = dataset.features["labels"].num_classes
    if outputs < classes:
        raise ValueError(f"The data set has {classes} classes and the model {outputs} outputs.")
