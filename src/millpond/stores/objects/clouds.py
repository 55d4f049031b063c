"""What the clouds do differently, and what they call their permissions and credentials."""

from __future__ import annotations

import enum


class Cloud(enum.Enum):
    """Whose bucket it is: what the clouds do differently is decided by this alone."""

    S3 = "s3"
    GOOGLE = "gs"
    AZURE = "az"
    MEMORY = "memory"

    @property
    def page(self) -> int:
        """Objects in one page of a listing, at most: one request each."""
        return 5000 if self is Cloud.AZURE else 1000

    @property
    def deletes(self) -> int:
        """Names in one request of ``delete_many``."""
        return {Cloud.S3: 1000, Cloud.AZURE: 256}.get(self, 1)


_READ = {
    Cloud.S3: "s3:GetObject (and s3:ListBucket)",
    Cloud.GOOGLE: "storage.objects.get",
    Cloud.AZURE: "read (Storage Blob Data Contributor)",
    Cloud.MEMORY: "reading",
}
_WRITE = {
    Cloud.S3: "s3:PutObject",
    Cloud.GOOGLE: "storage.objects.create and storage.objects.delete",
    Cloud.AZURE: "write (Storage Blob Data Contributor)",
    Cloud.MEMORY: "writing",
}
_DELETE = {
    Cloud.S3: "s3:DeleteObject",
    Cloud.GOOGLE: "storage.objects.delete",
    Cloud.AZURE: "delete (Storage Blob Data Contributor)",
    Cloud.MEMORY: "deleting",
}
_LIST = {
    Cloud.S3: "s3:ListBucket",
    Cloud.GOOGLE: "storage.objects.list",
    Cloud.AZURE: "list (Storage Blob Data Contributor)",
    Cloud.MEMORY: "listing",
}
PERMISSIONS = {
    "create": _WRITE,
    "replace": _WRITE,
    "upload": _WRITE,
    "read": _READ,
    "download": _READ,
    "delete": _DELETE,
    "delete_many": _DELETE,
    "list": _LIST,
}
CREDENTIALS = {
    Cloud.S3: "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role",
    Cloud.GOOGLE: "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`, or give the "
    "machine a service account",
    Cloud.AZURE: "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or give the machine a managed identity",
    Cloud.MEMORY: "none are needed",
}
