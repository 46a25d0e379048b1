"""Jobs of many requests at half the price, by the providers' batch APIs; sent once each, over crashes."""

from autobot_llm.cloud.batch_jobs.job import ItemError, ItemResult, Job, Part, Progress
from autobot_llm.cloud.batch_jobs.jobs import BatchJobs
from autobot_llm.cloud.batch_jobs.store import JobBusy

__all__ = ["BatchJobs", "ItemError", "ItemResult", "Job", "JobBusy", "Part", "Progress"]
