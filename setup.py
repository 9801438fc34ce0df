"""Package metadata. Lower bounds only: accelerator machines often carry newer releases."""

from setuptools import find_packages, setup

setup(
    name="streamsynth",
    version="0.1.0",
    description="Reinforcement-learned synthetic training data over a stream of tasks, in JAX.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["streamsynth", "streamsynth.*"]),
    python_requires=">=3.11",
    install_requires=[
        "clu>=0.0.12",
        "flax>=0.12",
        "importlib_resources",  # needed by TFDS, which does not declare it
        "jax>=0.10",
        "jinja2>=3.1.6",  # older ones have known ways out of the sandbox that chat templates run in
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "safetensors>=0.7",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.22",
    ],
    extras_require={
        # Workdirs in a bucket (gs://BUCKET/NAME).
        "gcs": ["etils[epath,epath-gcs]>=1.15"],
        "test": [
            "etils[epath,epath-gcs]>=1.15",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "prdc>=0.2",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "sacrebleu>=2.4",
            "scipy>=1.13",
            "vendi-score>=0.0.3",
        ],
        # What the benchmarks compare with; it brings torch.
        "bench": [
            "einops>=0.8",
            "google-tunix>=0.1.7",
            "rlax>=0.1.6",
            "torch>=2.6",
            "transformers>=4.57",
            "trl>=1.0",
        ],
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
    },
    entry_points={"console_scripts": ["streamsynth = streamsynth.main:run"]},
)
