"""How is a dataset of captioned images stored on disk?

It is a TensorFlow dataset in `array_record`: features, splits and version are described beside the
records, and neither writing nor reading needs TensorFlow. Datasets from elsewhere in that format
are read in the same way; the config names their fields.
"""

import contextlib
import dataclasses
import io
import itertools
import logging
import operator
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import tensorflow_datasets as tfds
from PIL import Image

from star_jax import files, image_io
from star_jax.core.argument_types import OMITTED, check_types
from star_jax.data import pipeline
from star_jax.data.pipeline import Example, Source
from star_jax.data.resizing import LANCZOS, Resizing
from star_jax.errors import UserError

Value = TypeVar('Value')

INFO = 'dataset_info.json'  # in the folder of every prepared dataset
TEXTS = ('label', 'source', 'licence', 'attribution')
SIZED_EXAMPLES = 16  # images whose sizes are looked at when a dataset is opened

log = logging.getLogger(__name__)


class Record(TypedDict):
    """One captioned image to write. A dataset may have more text fields.

    Attributes:
        key: name, unique in the split.
        image: the bytes of a PNG file.
        captions: one or more captions, the most detailed first.
        label: name of the class, or ''.
        source: origin of the image.
        licence: licence of the image.
        attribution: credit that the licence asks for.
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    label: str
    source: str
    licence: str
    attribution: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A dataset in the format of TensorFlow Datasets.

    Attributes:
        path: folder that holds dataset_info.json, or the name of a dataset in the tfds data folder
            ('', for validation: the training set).
        split: split of the dataset, or a slice of one such as train[:10%].
        image: field that holds the image.
        caption: field that holds one caption, several captions, or a class.
        label: field that holds the label ('': none).
        resizing: how images are resized: by Lanczos (the exact centre, or to whole pixels that
            cover it as Infinity), or halved and then by bicubic (LlamaGen); another kind is chosen
            in a config file.
    """

    path: str
    split: str = 'train'
    image: str = 'image'
    caption: str = 'captions'
    label: str = 'label'
    resizing: Resizing = dataclasses.field(default=LANCZOS, metadata=OMITTED)

    def __post_init__(self) -> None:
        check_types(self)

    def open(self, size: int | tuple[int, int]) -> Source:
        """The examples of the split, with images cropped to a size.

        A warning is logged if some of a few images are smaller than that.

        Args:
            size: side of a square, or (height, width), in pixels.

        Raises:
            UserError: the dataset, its split or a field is missing, or only TensorFlow can read it.
        """
        builder = _builder(self.path)
        self._check_fields(builder.info.features)
        splits = list(builder.info.splits)
        try:
            records = builder.as_data_source(
                split=self.split, decoders={self.image: tfds.decode.SkipDecoding()}
            )
        except NotImplementedError:
            raise UserError(
                f'the dataset {self.path} is stored as {builder.info.file_format.value}, '
                'which needs TensorFlow: expected array_record, '
                "prepare it again with file_format='array_record'"
            ) from None
        except ValueError:
            raise UserError(
                f'the dataset {self.path} has no split {self.split!r}: '
                f'expected one of {", ".join(splits)}'
            ) from None
        source = PreparedSource(
            config=self,
            folder=Path(builder.data_path),
            size=size,
            records=records,
            features=builder.info.features,
        )
        source.warn_if_enlarged()
        return source

    def _check_fields(self, features: Mapping[str, Any]) -> None:
        for role, field in (
            ('image', self.image),
            ('caption', self.caption),
            ('label', self.label),
        ):
            if field not in features and not (role == 'label' and field == ''):
                raise UserError(
                    f'the dataset {self.path} has no field {field!r} for {role}=: '
                    f'expected one of {", ".join(features)}'
                )
        kind = features[self.image]
        if not isinstance(kind, tfds.features.Image):
            raise UserError(
                f'the field {self.image!r} of {self.path} is a {type(kind).__name__}: '
                'expected an image, name another field with image='
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedSource:
    """Random access to a split, a `pipeline.Source`.

    Attributes:
        config: names the fields.
        folder: the files.
        size: side of a square, or (height, width), in pixels.
        records: sequence of the stored records.
        features: tfds features by field.
    """

    config: Prepared
    folder: Path
    size: int | tuple[int, int]
    records: Any
    features: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self._record(index)
        # Pillow decodes faster than tfds and releases the interpreter lock.
        image = Image.fromarray(self._of_image(index, record, image_io.decode))
        image = self.config.resizing.fit(image, self.size)
        captions = self._texts(record, self.config.caption)
        return Example(image=image, captions=captions, label=self._label(record))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._texts(self._record(index), self.config.caption)

    def label(self, index: int) -> str:
        return self._label(self._record(index))

    def ratio(self, index: int) -> float:
        height, width = self._sides(index)
        return height / width

    def at(self, size: int | tuple[int, int]) -> 'PreparedSource':
        return dataclasses.replace(self, size=size)

    def fingerprint(self) -> str:
        """Digest of the names and sizes of the files, and of a few records."""
        sizes = sorted((file.name, file.stat().st_size) for file in self.folder.iterdir())
        return pipeline.fingerprint(self, *sizes)

    def warn_if_enlarged(self) -> None:
        """Logs a warning if some of a few images are enlarged to the target size."""
        target, found = image_io.height_and_width(self.size), []
        for index in pipeline.even_indices(self, SIZED_EXAMPLES):
            with contextlib.suppress(UserError):  # of a damaged record, raised when it is needed
                sides = self._sides(index)
                found.append(any(map(operator.lt, sides, target)))
        if any(found):
            height, width = target
            log.warning(
                '%s: %d of %d images that were looked at are below %d x %d px and are enlarged: if '
                'their originals are larger, prepare the dataset again with --size %d or more',
                self.config.path,
                sum(found),
                len(found),
                height,
                width,
                max(target),
            )

    def _sides(self, index: int) -> tuple[int, int]:
        """(height, width) of an image in pixels."""
        return self._of_image(index, self._record(index), image_io.upright_sides)

    def _record(self, index: int) -> Mapping[str, Any]:
        try:
            return self.records[index]
        except (RuntimeError, ValueError) as error:  # raised by array_record for damaged files
            raise _damaged(self.config.path, error) from error

    def _of_image(
        self, index: int, record: Mapping[str, Any], read: Callable[[bytes], Value]
    ) -> Value:
        """The result of `read` for the image file of a record."""
        try:
            return read(record[self.config.image])
        except OSError as error:
            raise UserError(
                f'the field {self.config.image!r} of record {index} of {self.config.path} is no '
                f'image ({error}): prepare the dataset again without it'
            ) from error

    def _label(self, record: Mapping[str, Any]) -> str:
        return self._texts(record, self.config.label)[0] if self.config.label else ''

    def _texts(self, record: Mapping[str, Any], field: str) -> tuple[str, ...]:
        feature, value = self.features[field], record[field]
        try:
            if isinstance(feature, tfds.features.Sequence):
                return tuple(_text(feature.feature, part) for part in value)
            return (_text(feature, value),)
        except UnicodeDecodeError as error:
            raise UserError(
                f'the field {field!r} of {self.config.path} is not text in UTF-8: '
                'name another field with caption= or label='
            ) from error


def write(
    folder: str | os.PathLike[str],
    splits: Mapping[str, Iterable[Record]],
    *,
    name: str = 'captioned',
    description: str = 'Captioned images.',
    version: str = '1.0.0',
    extra: tuple[str, ...] = (),
) -> Path:
    """Writes a dataset; until it is complete, `folder` keeps its old contents.

    Args:
        folder: folder of the dataset; an existing prepared dataset is replaced.
        splits: the records of every split, which are read once. Their keys alone decide the order
            in which they are stored.
        name: name of the dataset.
        description: description of the dataset.
        version: version of the dataset.
        extra: names of more text fields of the records.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: a split has no record, or `folder` cannot be written or holds something else than
            a prepared dataset.
    """
    folder = Path(folder).absolute()
    check_free(folder)
    try:
        with files.replacing_folder(folder, lambda _: True) as new:
            with _quiet(), _temporary_files_in(new / 'temporary'):
                builder = _CaptionedBuilder(
                    name=name,
                    splits=splits,
                    description=description,
                    version=version,
                    extra=extra,
                    data_dir=str(new / 'work'),
                )
                builder.download_and_prepare()
            for file in Path(builder.data_dir).iterdir():
                file.rename(new / file.name)
            for name in ('temporary', 'work'):
                shutil.rmtree(new / name)
    except OSError as error:
        raise UserError(f'{folder} cannot be written ({error}): choose another folder') from error
    return folder


def check_free(folder: Path) -> None:
    """Raises UserError if `folder` holds something else than a prepared dataset."""
    files.check_folder(folder)
    if folder.exists() and not _replaceable(folder):
        raise UserError(
            f'{folder} holds something else than a prepared dataset: choose an empty folder'
        )


class _CaptionedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Describes a dataset to tfds, which writes it; reading needs only the folder."""

    VERSION = tfds.core.Version('1.0.0')

    def __init__(
        self,
        *,
        name: str,
        splits: Mapping[str, Iterable[Record]],
        description: str,
        version: str,
        extra: tuple[str, ...],
        data_dir: str,
    ):
        self.name = name
        self.VERSION = tfds.core.Version(version)
        self._examples = splits
        self._description = description
        self._extra = extra
        super().__init__(data_dir=data_dir, file_format='array_record')

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = dict(
            image=tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
            captions=tfds.features.Sequence(text()),
            **{field: text() for field in (*TEXTS, *self._extra)},
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._description,
            features=tfds.features.FeaturesDict(features),
            license='the field `licence` of each record',
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
        return {split: self._generate_examples(split) for split in self._examples}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        records = iter(self._examples[split])
        first = next(records, None)
        if first is None:
            raise UserError(
                f'the split {split!r} has no record: expected at least one, leave it out'
            )
        for record in itertools.chain([first], records):
            fields = {field: record[field] for field in (*TEXTS, *self._extra)}
            captions = list(record['captions'])
            yield record['key'], dict(image=record['image'], captions=captions, **fields)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the messages and progress bars of tfds: writing takes seconds."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Puts temporary files into a new folder: tfds makes some that it never removes."""
    folder.mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and (is_prepared(folder) or not any(folder.iterdir()))


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a prepared dataset, not image files."""
    return os.path.isfile(Path(os.path.expanduser(path)) / INFO)


def splits(path: str) -> tuple[str, ...]:
    """The names of the splits of a dataset; raises the UserErrors of `Prepared.open`."""
    return tuple(_builder(path).info.splits)


def _builder(path: str) -> tfds.core.DatasetBuilder:
    folder = Path(os.path.expanduser(path))
    if is_prepared(path):
        for file in folder.iterdir():
            files.check_regular(file)
        try:
            return tfds.builder_from_directory(folder)
        except Exception as error:  # tfds has no exception class for damaged files
            raise _damaged(path, error) from error
    if not path:
        raise UserError('no dataset was given: name the folder of a prepared dataset with path=')
    if os.path.isdir(folder):
        raise UserError(
            f'{path} holds no prepared dataset: expected a folder with {INFO}, made by star-jax '
            f"data prepare; for image files with captions write data=Folder(path='{path}')"
        )
    if folder.is_absolute() or path.startswith(('.', '~')):
        raise UserError(f'no folder {path}: expected a prepared dataset, see star-jax data prepare')
    return _builder_by_name(path)


def _damaged(path: str, error: Exception) -> UserError:
    reason = str(error).partition('\n')[0]
    return UserError(f'the dataset {path} is damaged ({reason}): prepare it again')


def _builder_by_name(name: str) -> tfds.core.DatasetBuilder:
    """The builder of a dataset in the tfds data folder."""
    try:
        with files.temporary_folder() as work, _temporary_files_in(work / 'tfds'):
            builder = tfds.builder(name)
    except Exception as error:  # tfds runs code of the dataset's author, which may raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f'{name} is neither a folder nor a dataset that tfds can open ({reason}): '
            'give the folder of a prepared dataset'
        ) from None
    if not builder.info.splits:
        raise UserError(
            f'the dataset {name} is not prepared in {builder.data_dir}: '
            "run tfds.builder(...).download_and_prepare(file_format='array_record') once"
        )
    return builder


def _text(feature: Any, value: Any) -> str:
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value))
    return value.decode() if isinstance(value, bytes) else str(value)
