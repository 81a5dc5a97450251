"""The suite on a TPU VM, through gcloud: connect, bring the code, make an environment, run, stream, bring the reports.

``gcloud`` has the command lines, ``host_key`` the pin, ``source`` the commit, ``remote`` and ``remote.sh`` what runs on
the VM, ``stream`` the log on its way here, ``shell`` the processes, ``session`` and ``run`` the steps, ``dry_run`` the
same steps as text, ``command`` what a person types.
"""
