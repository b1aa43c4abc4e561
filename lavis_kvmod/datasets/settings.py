"""Every key of a data set's section in a run file: its default, its meaning, its check.

A builder names the class of its section (`PackagedBuilder.settings_class`). What is below ``build_info``, the columns
and the processors are tables with declared keys of their own.
"""

from typing import Any, ClassVar, Dict, List, Literal, Optional, Type, Union

from lavis_kvmod.demo import digits
from lavis_kvmod.system.schema import Settings, key

__all__ = [
    "CaptionColumns",
    "CustomCaptionSettings",
    "CustomSettings",
    "CustomVQASettings",
    "DataSettings",
    "DigitsSettings",
    "EasyVQASettings",
    "FileSettings",
    "ImagesSettings",
    "OfficialSettings",
    "ProcessorSettings",
    "SampleSettings",
    "ShardSettings",
    "SplitSettings",
    "VQAColumns",
]

_PATHS = "the path of a file, or a list of them (YAML wants a number in quotes)"
_Name = Union[str, int]
_ONE = "the name of one column"
_SEVERAL = "the name of a column, or a list of names"


class ImagesSettings(Settings):
    """``build_info.images``."""

    storage: Union[str, List[str], None] = key(
        None, "folder of the images, or a list; subfolders are searched", expected=_PATHS.replace("file", "folder")
    )
    allow_outside: bool = key(False, "whether a name in a table may lead out of those folders")


class SplitSettings(Settings):
    """``build_info.annotations.<split>``. A split that is null is not there; a path stands for its ``storage``."""

    storage: Union[str, List[str], None] = key(None, "the split's file, or a list of files", expected=_PATHS)
    url: Union[str, List[str], None] = key(
        None, "where it is to be had; LAVIS's own sets are fetched from there", expected="a URL, or a list of them"
    )
    md5: Union[str, List[str], None] = key(None, "LAVIS's, of what is fetched", expected="a sum, or a list of them")
    questions: Any = key(None, "`vqav2`: the file of questions, or `{url, storage}`", expected="a path or a table")
    annotations: Any = key(None, "`vqav2`: the file of answers, the same", expected="a path or a table")
    images: Any = key(
        None,
        "`vqav2`, `textvqa`: `{pattern}`, the path of an image by its id below the images' folder, and `url`",
        expected="a table",
    )


class FileSettings(Settings):
    """``build_info``."""

    images: Dict[str, Any] = key({}, "where the images are", expected="keys with values")
    annotations: Dict[str, Any] = key({}, "the files of each split", expected="keys with values")
    answer_list: Any = key(
        None, "`vqav2`: candidates for `rank`, a path or `{url, storage}`", expected="a path or a table"
    )
    wrong_captions: Any = key(
        {},
        "`digits_caption`: `{train: 0.3}` gives so many of a split's scans the captions of others",
        expected="shares by split",
    )

    tables: ClassVar[Dict[str, Type[Settings]]] = {"images": ImagesSettings}

    def conflicts(self) -> List[str]:
        """What is wrong with the splits' tables."""
        tables = {split: entry for split, entry in self.annotations.items() if isinstance(entry, dict)}
        of_splits = {split: SplitSettings.check_all(entry)[1] for split, entry in tables.items()}
        return super().conflicts() + [f"annotations.{split}.{told}" for split in tables for told in of_splits[split]]


class ProcessorSettings(Settings):
    """``vis_processor`` and ``text_processor``."""

    train: Optional[Dict[str, Any]] = key(None, "of the split `train`: `name`, and its own keys", expected="a table")
    eval: Optional[Dict[str, Any]] = key(None, "of all others", expected="a table")


class DataSettings(Settings):
    """What LAVIS reads of every data set's section."""

    type: str = key("default", "which of the builder's default files; see `lavis-kvmod list datasets`")
    data_type: Literal["images"] = key("images", "the entry of `build_info` that has the pictures")
    build_info: Dict[str, Any] = key({}, "the files: below", expected="keys with values")
    vis_processor: Dict[str, Any] = key(
        {}, "LAVIS's processors of images, by `train` and `eval`", expected="keys with values"
    )
    text_processor: Dict[str, Any] = key({}, "the same, of texts", expected="keys with values")
    dataset_card: Optional[str] = key(None, "LAVIS's, for people")

    tables: ClassVar[Dict[str, Type[Settings]]] = {
        "build_info": FileSettings,
        "vis_processor": ProcessorSettings,
        "text_processor": ProcessorSettings,
    }


class DigitsSettings(DataSettings):
    """What ``digits_vqa``, ``digits_caption`` and ``digits_retrieval`` read beside that."""

    train_scans: int = key(
        digits.SPLITS["train"], "scans that are trained on: few are few labels", ge=1, le=digits.SPLITS["train"]
    )


class SampleSettings(DataSettings):
    """What all sets of files read beside that."""

    on_bad_sample: Literal["raise", "skip"] = key(
        "raise",
        "`skip` goes on without a sample that cannot be used ([data.md](data.md))",
        expected="raise or skip",
    )
    max_bad_share: float = key(
        0.05, "the share of bad samples above which `skip` stops too", ge=0, le=1, expected="a number from 0 to 1"
    )


EASY_VQA_DRAWINGS = 3600  # to train on, without those of val


class EasyVQASettings(SampleSettings):
    """What ``easy_vqa`` reads beside that."""

    train_drawings: int = key(
        EASY_VQA_DRAWINGS, "drawings that are trained on: few are few labels", ge=1, le=EASY_VQA_DRAWINGS
    )


# No common base: a table of docs/settings.md has a class's own keys, and these belong in both.
_IMAGE = (
    "a path, or a name to be found below the folders; for several images a row, several columns, or cells with "
    "a list ([inputs.md](inputs.md))"
)
_VIDEO = "instead of an image, a video, of which frames are seen"


class VQAColumns(Settings):
    """``columns`` of ``custom_vqa``: a name for each purpose."""

    image: Union[_Name, List[_Name]] = key("image", _IMAGE, expected=_SEVERAL)
    video: Optional[_Name] = key("video", _VIDEO, expected=_ONE)
    question: _Name = key("question", "the question", expected=_ONE)
    answer: Union[_Name, List[_Name], None] = key("answer", "one answer, or those of many people", expected=_SEVERAL)
    weight: Union[_Name, List[_Name], None] = key(
        "weight", "what each answer weighs in training, as many as answers", expected=_SEVERAL
    )
    question_id: Optional[_Name] = key("question_id", "any number or text, each once in a split", expected=_ONE)
    image_id: Optional[_Name] = key("image_id", "any number or text, the same for all rows of an image", expected=_ONE)
    question_type: Optional[_Name] = key("question_type", "accuracy is told by type as well", expected=_ONE)
    answer_type: Optional[_Name] = key("answer_type", "the same", expected=_ONE)


class CaptionColumns(Settings):
    """``columns`` of ``custom_caption``."""

    image: Union[_Name, List[_Name]] = key("image", _IMAGE, expected=_SEVERAL)
    video: Optional[_Name] = key("video", _VIDEO, expected=_ONE)
    caption: Union[_Name, List[_Name], None] = key("caption", "one caption or many", expected=_SEVERAL)
    image_id: Optional[_Name] = key("image_id", "any number or text, the same for all rows of an image", expected=_ONE)


class CustomSettings(SampleSettings):
    """What ``custom_vqa``, ``custom_caption``, ``custom_instruct`` and ``artquest`` read beside that."""

    columns: Dict[str, Any] = key({}, "names of columns that are not as below", expected="keys with values")
    split: Optional[Dict[str, Any]] = key(
        None, "`{val: 0.1, test: 0.1, seed: 42}` takes whole images away from train", expected="keys with values"
    )
    format: Optional[str] = key(None, "`csv`, `tsv`, `json`, `jsonl`, `parquet`; by the file's ending")
    delimiter: Optional[str] = key(None, "between the columns of a CSV file; found out")
    encoding: Optional[str] = key(None, "of a text file; UTF-8")


class VideoSettings(CustomSettings):
    """What ``custom_vqa``, ``custom_caption`` and ``artquest`` read beside that."""

    frames: int = key(8, "how many frames of a video are seen ([inputs.md](inputs.md))", gt=0)
    frames_by: Literal["uniform", "scene"] = key(
        "uniform", "which: `uniform`, evenly spaced; `scene`, one of each scene", expected="uniform or scene"
    )


class CustomVQASettings(VideoSettings):
    """What ``custom_vqa`` and ``artquest`` read beside that."""

    answer_separator: Optional[str] = key(None, "what stands between several answers in one cell")
    answer_list: Union[str, List[Any], None] = key(
        None,
        "candidates for `run.inference_method: rank`: a list, a JSON file with a list, or a text file with a line "
        "each; by default all answers in train",
        expected="a list, or the path of a file",
    )

    tables: ClassVar[Dict[str, Type[Settings]]] = {**DataSettings.tables, "columns": VQAColumns}


class CustomCaptionSettings(VideoSettings):
    """What ``custom_caption`` reads beside that."""

    caption_separator: Optional[str] = key(None, "what stands between several captions in one cell")

    tables: ClassVar[Dict[str, Type[Settings]]] = {**DataSettings.tables, "columns": CaptionColumns}


class InstructColumns(Settings):
    """``columns`` of ``custom_instruct``."""

    image: Union[_Name, List[_Name]] = key(
        "image",
        "the image's name, or a list of names, a mark each; messages may name their own",
        expected=_SEVERAL,
    )
    conversations: Optional[_Name] = key("conversations", "LLaVA's turns: `from` and `value`", expected=_ONE)
    messages: Optional[_Name] = key("messages", "or Hugging Face's: `role` and `content`", expected=_ONE)
    id: Optional[_Name] = key("id", "any number or text, for the names of its questions in evaluation", expected=_ONE)
    image_id: Optional[_Name] = key("image_id", "any number or text, the same for all rows of an image", expected=_ONE)


class CustomInstructSettings(CustomSettings):
    """What ``custom_instruct`` reads beside that."""

    tables: ClassVar[Dict[str, Type[Settings]]] = {**DataSettings.tables, "columns": InstructColumns}


class OfficialSettings(SampleSettings):
    """What ``vqav2`` and ``textvqa`` read beside that."""

    train_on: Literal["train", "trainval"] = key(
        "train", "`trainval` adds val to what is trained on; there is then no val to evaluate on"
    )


class ShardSettings(SampleSettings):
    """What ``wds_vqa`` and ``wds_caption`` read beside that."""

    epoch_size: Optional[int] = key(
        None, "samples in an epoch of training, over all GPUs; all of them, where an index tells how many", gt=0
    )
    shuffle_buffer: int = key(1000, "samples that are shuffled among each other in training, in each worker", gt=0)
