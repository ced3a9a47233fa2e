"""PopulationService: generations of prompts, which workers make."""

import datetime as dt
from typing import Any

import grpc
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import population_pb2 as pb
from ebbflow.api.v1 import population_pb2_grpc
from ebbflow.cloud.feedback import population, population_queue
from ebbflow.cloud.registry.answers import remember
from ebbflow.cloud.registry.paging import page
from ebbflow.cloud.registry.tables import Population
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert import populations
from ebbflow.cloud.services.student import find as find_student
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

Context = grpc.aio.ServicerContext[Any, Any]

NEWEST = "/populations/-"


class PopulationService(population_pb2_grpc.PopulationServiceServicer):
    """See population.proto."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def EvolvePopulation(
        self, request: pb.EvolvePopulationRequest, context: Context
    ) -> pb.EvolvePopulationResponse:
        """Queues the next generation."""
        call, student_id = current(), names.parse(request.student, "students")

        def work(session: Session, now: dt.datetime) -> pb.EvolvePopulationResponse:
            def act() -> pb.EvolvePopulationResponse:
                row = population_queue.queue(session, find_student(session, student_id), request, now)
                return pb.EvolvePopulationResponse(population=populations.population(row))

            answer = remember(session, call.actor, request.request_id, request, now, act, pb.EvolvePopulationResponse)
            call.resource = answer.population.name
            return answer

        return await self._cloud.change(work)

    async def GetPopulation(self, request: pb.GetPopulationRequest, context: Context) -> pb.GetPopulationResponse:
        """Returns one generation with its prompts."""
        row = await self._cloud.read(lambda session: _find(session, request.name))
        return pb.GetPopulationResponse(population=populations.population(row))

    async def ListPopulations(self, request: pb.ListPopulationsRequest, context: Context) -> pb.ListPopulationsResponse:
        """Returns a page of generations without their prompts, newest first."""
        student_id = names.parse(request.parent, "students")
        query = sa.select(Population).where(Population.student_id == student_id)

        def work(session: Session) -> pb.ListPopulationsResponse:
            find_student(session, student_id)
            rows, token = page(
                session, query, [Population.generation], request.page_size, request.page_token, descending=True
            )
            found = [populations.population(row, prompts=False) for row in rows]
            return pb.ListPopulationsResponse(populations=found, next_page_token=token)

        return await self._cloud.read(work)


def _find(session: Session, name: str) -> Population:
    if not name.endswith(NEWEST):
        return population.find(session, *names.parse_population(name))
    student = find_student(session, names.parse(name.removesuffix(NEWEST), "students"))
    row = population.newest(session, student.id)
    if row is None:
        message = f"students/{student.id} has no population: make one with `ebbflow population evolve {student.id}`"
        raise EbbflowError(Reason.POPULATION_NOT_FOUND, message, population=name)
    return row
