"""Measure the original's pipeline: read, decode, resize and augment frames of a mixture with TensorFlow on one core.

    taskset -c 0 tf-env/bin/python benchmarks/tensorflow_pipeline.py FOLDER

`FOLDER` contains RLDS datasets, which `benchmarks/data.py throughput --tensorflow tf-env/bin/python` writes before it
calls this script. The script needs only tensorflow-cpu, in a virtual environment of its own.
"""

import argparse
import glob
import os
import time


# Before the import: only errors in the log.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf


SIZE = 224
CROP_AREA = 0.9


def read_episodes(folder: str) -> tf.data.Dataset:
    """Read the encoded frames of a dataset endlessly, in a new order of files in each pass."""
    files = tf.data.Dataset.from_tensor_slices(sorted(glob.glob(f"{folder}/*/*.tfrecord*"))).shuffle(1000).repeat()
    features = {
        "steps/observation/image": tf.io.VarLenFeature(tf.string),
        "steps/action": tf.io.VarLenFeature(tf.float32),
        "steps/language_instruction": tf.io.VarLenFeature(tf.string),
    }

    def parse(record: tf.Tensor) -> dict[str, tf.Tensor]:
        found = tf.io.parse_single_example(record, features)
        images = tf.sparse.to_dense(found["steps/observation/image"])
        return {
            "image": images,
            "action": tf.reshape(tf.sparse.to_dense(found["steps/action"]), (tf.shape(images)[0], -1)),
            "instruction": tf.sparse.to_dense(found["steps/language_instruction"]),
        }

    return tf.data.TFRecordDataset(files).map(parse, num_parallel_calls=1).unbatch()


def augment(frame: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Decode, resize and augment a frame with the original's operations and ranges."""
    image = tf.io.decode_image(frame["image"], expand_animations=False, dtype=tf.uint8)
    image = tf.image.resize(image, (SIZE, SIZE), method="lanczos3", antialias=True)
    image = tf.clip_by_value(image, 0, 255) / 255
    side = tf.sqrt(tf.constant(CROP_AREA))
    start = tf.random.uniform(()) * (1 - side)
    image = tf.image.crop_and_resize(image[None], [[start, start, start + side, start + side]], [0], (SIZE, SIZE))[0]
    image = tf.clip_by_value(tf.image.random_brightness(image, 0.2), 0, 1)
    image = tf.clip_by_value(tf.image.random_contrast(image, 0.8, 1.2), 0, 1)
    image = tf.clip_by_value(tf.image.random_saturation(image, 0.8, 1.2), 0, 1)
    image = tf.clip_by_value(tf.image.random_hue(image, 0.05), 0, 1)
    return {**frame, "image": tf.cast(tf.round(image * 255), tf.uint8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--frames", type=int, default=2000, help="to measure (default: %(default)s)")
    parser.add_argument("--buffer", type=int, default=1000, help="frames in the shuffle buffer (default: %(default)s)")
    args = parser.parse_args()
    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    parts = [read_episodes(path) for path in sorted(glob.glob(f"{args.folder}/robot*"))]
    pipeline = (
        tf.data.Dataset.sample_from_datasets(parts, seed=0).shuffle(args.buffer).map(augment, num_parallel_calls=1)
    )
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    drawn = iter(pipeline.with_options(options))
    for _ in range(args.buffer // 10):
        next(drawn)
    start = time.perf_counter()
    for _ in range(args.frames):
        next(drawn)
    speed = args.frames / (time.perf_counter() - start)
    print(f"TensorFlow {tf.__version__}, the same files: {speed:,.0f} frames/s", flush=True)


if __name__ == "__main__":
    main()
