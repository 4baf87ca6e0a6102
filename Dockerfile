# The command `ouroboros` for processors without a GPU. docs/how-to/install.md says how it is built and run.
FROM python:3.12-slim

# Which extras are installed.
ARG EXTRAS=report,serve
# Another package index, such as that of torch's builds for processors, which are much smaller. pip reads it.
ARG PIP_EXTRA_INDEX_URL

WORKDIR /build
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint requirements.lock ".[${EXTRAS}]" \
    && useradd --create-home --uid 1000 ouroboros \
    && install --directory --owner ouroboros /data

# Models and texts are in /data, which is a volume or a directory of the host.
USER 1000
WORKDIR /data
EXPOSE 8000
ENTRYPOINT ["ouroboros"]
CMD ["--help"]
