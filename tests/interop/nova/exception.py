"""Exceptions with the constructor of Nova's, which is what the wire relies on."""


class NovaException(Exception):
    msg_fmt = "An unknown exception occurred."
    code = 500

    def __init__(self, message=None, **kwargs):
        self.kwargs = kwargs
        self.kwargs.setdefault("code", self.code)
        if message is None:
            message = self.msg_fmt % kwargs
        self.message = message
        super().__init__(message)

    def format_message(self):
        return self.args[0]


class MigrationPreCheckError(NovaException):
    msg_fmt = "Migration pre-check error: %(reason)s"


class InstanceNotFound(NovaException):
    msg_fmt = "Instance %(instance_id)s could not be found."
    code = 404


class UnableToMigrateToSelf(NovaException):
    msg_fmt = "Unable to migrate instance (%(instance_id)s) to current host (%(host)s)."
