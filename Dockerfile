# python:slim rather than a CUDA image: PyTorch's wheels bring their own CUDA libraries, so a CUDA
# base would hold them twice. The driver comes from the host, with --gpus all.
# Checked with hadolint, and its pip commands by themselves; the image has not been built yet.
FROM python:3.13-slim

# torch.compile's Triton builds its launchers on the machine that runs them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Dependencies first: gigabytes that a change of vgan's code leaves as they are.
WORKDIR /src
COPY pyproject.toml ./
# hadolint ignore=DL3013
RUN pip install --no-cache-dir uv \
    && uv pip install --system --no-cache --requirements pyproject.toml \
       --extra demo --extra eval --extra export --extra video --extra webdataset

COPY README.md LICENSE ./
COPY configs configs
COPY vgan vgan
RUN uv pip install --system --no-cache --no-deps .

# Any user may run it (docker run --user): the home takes caches, and PyTorch asks for a user's name.
RUN useradd --create-home --uid 1000 vgan && chmod 1777 /home/vgan
ENV HOME=/home/vgan USER=vgan
USER 1000
WORKDIR /work

ENTRYPOINT ["vgan"]
CMD ["--help"]
