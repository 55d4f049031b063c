"""The store in a bucket: S3, Google Cloud Storage, Azure Blob."""

from __future__ import annotations
