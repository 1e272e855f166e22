"""One lab a host, for the cases of the tests that were chosen."""

import pytest

from tests.support.exactness_lab import HOSTS, Case, Lab


def _cases(session, host: str) -> list[Case]:
    """In the order of the tests, those that are compared behind their baselines."""
    found = []
    for item in session.items:
        params = getattr(item, "callspec", None) and item.callspec.params
        if not params or params.get("host") != host:
            continue
        if "case" in params:
            found += [params["case"].baseline, params["case"]]
        else:
            found.append(params["broken"])
    return found


@pytest.fixture(scope="session")
def labs(request, tmp_path_factory):
    """host -> its Lab, which begins when it is first asked for."""
    running = {}

    def lab(host: str) -> Lab:
        if host not in running:
            folder = tmp_path_factory.mktemp(host)
            running[host] = Lab(HOSTS[host], folder, _cases(request.session, host))
        return running[host]

    yield lab
    for one in running.values():
        one.close()
