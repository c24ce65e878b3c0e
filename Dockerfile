# Two images from one file: `api` (no torch) and `worker` (with the engine).
#
#   docker build --target api -t p2d-api .
#   docker build --target worker -t p2d-worker .
#
# torch is the build that pip finds by itself: CUDA on x86_64 (it runs without a GPU too).

FROM python:3.13-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt pyproject.toml README.md ./
COPY p2d p2d
COPY app app
COPY workers workers
COPY migrations migrations
# A user of its own with a fixed number, so that volumes can be given to it.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin p2d \
    && install -d -o p2d -g p2d /var/lib/p2d
ENV P2D_HOME=/var/lib/p2d HOME=/var/lib/p2d

FROM base AS api
RUN pip install -c constraints.txt .
WORKDIR /var/lib/p2d
USER 10001:10001
ENV P2D_HOST=0.0.0.0
EXPOSE 8321
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8321/healthz', timeout=4)"]
ENTRYPOINT ["p2d"]
CMD ["api"]

FROM base AS worker
RUN pip install -c constraints.txt '.[engine]'
WORKDIR /var/lib/p2d
USER 10001:10001
# 25 s for the child to stop and the step to be given back; orchestrators kill after 30 s.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, psycopg; psycopg.connect(os.environ['P2D_DATABASE_URL'], connect_timeout=5)"]
ENTRYPOINT ["p2d"]
CMD ["worker"]
