"""What of KubeRay's `RayService` (ray.io/v1) our manifests use; a field that is not here, or is misspelt, is refused.

Pod templates are left to Kubernetes' own schema. KubeRay's whole schema is in its CRD: `pytest --kuberay-crd FILE`.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AutoscalerOptions(_Part):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: int  # noqa: N815
    resources: dict[str, Any]
    securityContext: dict[str, Any]  # noqa: N815


class AuthOptions(_Part):
    mode: Literal["token", "disabled"]


class RedisPassword(_Part):
    valueFrom: dict[Literal["secretKeyRef"], dict[Literal["name", "key"], str]]  # noqa: N815


class GCSFaultToleranceOptions(_Part):
    redisAddress: str  # noqa: N815
    redisPassword: RedisPassword  # noqa: N815


class HeadGroup(_Part):
    rayStartParams: dict[str, str]  # noqa: N815
    template: dict[str, Any]


class WorkerGroup(HeadGroup):
    groupName: str  # noqa: N815
    replicas: int
    minReplicas: int  # noqa: N815
    maxReplicas: int  # noqa: N815


class RayClusterConfig(_Part):
    rayVersion: str  # noqa: N815
    enableInTreeAutoscaling: bool  # noqa: N815
    autoscalerOptions: AutoscalerOptions  # noqa: N815
    authOptions: AuthOptions  # noqa: N815
    gcsFaultToleranceOptions: GCSFaultToleranceOptions  # noqa: N815
    headGroupSpec: HeadGroup  # noqa: N815
    workerGroupSpecs: list[WorkerGroup]  # noqa: N815


class RayServiceSpec(_Part):
    serveConfigV2: str  # noqa: N815
    excludeHeadPodFromServeSvc: bool  # noqa: N815
    rayClusterConfig: RayClusterConfig  # noqa: N815


class RayService(_Part):
    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayService"]
    metadata: dict[Literal["name"], str]
    spec: RayServiceSpec
