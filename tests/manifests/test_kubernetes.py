"""cluster/kuberay: against the schemas of Kubernetes and KubeRay, Ray Serve's and our own."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from gptj_serve.config import ServiceConfig
from tests.manifests.ray_service import RayService, WorkerGroup
from tests.serving.service import ROOT

DIRECTORY = ROOT / "cluster" / "kuberay"
KUBERNETES = "1.32"
OBJECTS = [
    (f"{file.name}, {each['kind']} {each['metadata']['name']}", each)
    for file in sorted(DIRECTORY.glob("*.yaml"))
    for each in yaml.safe_load_all(file.read_text())
]
BY_OPERATORS = ("ray.io/", "monitoring.coreos.com/")
DEPLOYMENT_OF = {"gptj-6b-gpu": "gptj-6b-4gpu", "gptj-6b-cpu": "gptj-6b-cpu"}


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((DIRECTORY / f"{name}.yaml").read_text())


def pods(service: RayService) -> list[dict[str, Any]]:
    """Of head and workers, as Kubernetes would be given them, with the label that KubeRay gives each group's."""
    cluster = service.spec.rayClusterConfig
    templates = {"headgroup": cluster.headGroupSpec.template} | {
        group.groupName: group.template for group in cluster.workerGroupSpecs
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "a", "labels": {**template["metadata"]["labels"], "ray.io/group": group}},
            "spec": template["spec"],
        }
        for group, template in templates.items()
    ]


@pytest.mark.manifests
@pytest.mark.parametrize(
    "each", [pytest.param(each, id=name) for name, each in OBJECTS if not each["apiVersion"].startswith(BY_OPERATORS)]
)
def test_kubernetes_takes_it(each: dict[str, Any]) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(each, KUBERNETES, strict=True)


@pytest.mark.manifests
@pytest.mark.parametrize("name", DEPLOYMENT_OF)
def test_kubernetes_takes_the_pods(name: str) -> None:
    import kubernetes_validate

    for pod in pods(RayService.model_validate(manifest(name))):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", DEPLOYMENT_OF)
def test_a_misspelt_field_is_found(name: str) -> None:
    spec = manifest(name)
    spec["spec"]["rayClusterConfig"]["gcsFaultTolerance"] = spec["spec"]["rayClusterConfig"].pop(
        "gcsFaultToleranceOptions"
    )
    with pytest.raises(ValidationError, match="gcsFaultTolerance"):
        RayService.model_validate(spec)


@pytest.mark.parametrize("name", DEPLOYMENT_OF)
def test_kuberays_crd_takes_it(name: str, pytestconfig: pytest.Config) -> None:
    """`pytest --kuberay-crd ray.io_rayservices.yaml`, a file of KubeRay's; it is not in this repository."""
    if (file := pytestconfig.getoption("--kuberay-crd")) is None:
        pytest.skip("needs --kuberay-crd FILE")
    versions = yaml.safe_load(Path(file).read_text())["spec"]["versions"]
    (schema,) = [each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1"]
    del schema["properties"]["metadata"]
    schema = {**as_json_schema(schema), "additionalProperties": True}
    jsonschema.validate(manifest(name), schema)
    wrong = manifest(name)
    wrong["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagine"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="imagine"):
        jsonschema.validate(wrong, schema)


def as_json_schema(schema: Any) -> Any:
    """As the API server reads it: it knows integers that may be strings, and refuses fields that are not there."""
    if isinstance(schema, list):
        return [as_json_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: as_json_schema(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string") is True:
        made.pop("type", None)
    if made.get("type") == "object" and isinstance(made.get("properties"), dict):
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.parametrize(("name", "deployment"), DEPLOYMENT_OF.items())
def test_it_serves_what_the_deployment_serves(name: str, deployment: str) -> None:
    """But for where it listens, where ingresses are, and that rollouts, and on GPUs the load, may ask for nodes."""
    own = yaml.safe_load(RayService.model_validate(manifest(name)).spec.serveConfigV2)
    ServeDeploySchema.model_validate(own)
    plain = yaml.safe_load((ROOT / "deployments" / f"{deployment}.yaml").read_text())
    assert own["http_options"] == {"host": "0.0.0.0", "port": 8000}
    (application,), (expected,) = own["applications"], plain["applications"]
    assert application["args"].pop("rollout") == {"surge": "always"}
    autoscaling = application["args"].pop("autoscaling", None)
    assert (autoscaling is not None) is (ServiceConfig.model_validate(application["args"]).pipeline.stage.num_gpus > 0)
    assert autoscaling is None or autoscaling["may_add_nodes"] is True
    ingress = application["args"].pop("ingress")
    assert {**expected["args"].pop("ingress", {}), **ingress} == ingress, "what the deployment says of them is here too"
    assert ingress == {"num_replicas": 2, "num_cpus": 0, "resources": {"ingress": 1}}
    assert application == expected
    ServiceConfig.model_validate(application["args"])


def ray_resources(group: WorkerGroup) -> dict[str, int]:
    """What one pod of the group brings, as Ray's autoscaler reads it: it asks for pods by that."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec

    return _get_ray_resources_from_group_spec(group.model_dump(), is_head=False)


@pytest.mark.parametrize("name", DEPLOYMENT_OF)
def test_the_fewest_workers_have_room_for_the_service_and_the_most_for_a_rollout(name: str) -> None:
    service = RayService.model_validate(manifest(name))
    (application,) = yaml.safe_load(service.spec.serveConfigV2)["applications"]
    config = ServiceConfig.model_validate(application["args"])
    pipeline = config.pipeline
    _, group = service.spec.rayClusterConfig.workerGroupSpecs
    resources = ray_resources(group)
    num_gpus, num_cpus = resources.get("GPU", 0), resources["CPU"]
    stages_per_pod = int(num_gpus or num_cpus // pipeline.stage.num_cpus)
    left_over = num_cpus - stages_per_pod * pipeline.stage.num_cpus
    assert left_over >= pipeline.engine_num_cpus
    needed = -(-pipeline.num_stages // stages_per_pod)
    assert group.minReplicas == group.replicas >= needed
    most_pipelines = config.num_pipelines if config.autoscaling is None else config.autoscaling.max_pipelines
    assert group.maxReplicas >= (most_pipelines + 1) * needed


@pytest.mark.parametrize("name", DEPLOYMENT_OF)
def test_ingresses_keep_no_large_worker(name: str) -> None:
    """Theirs have room for nothing else, and each for all of them, twice in a rollout."""
    service = RayService.model_validate(manifest(name))
    (application,) = yaml.safe_load(service.spec.serveConfigV2)["applications"]
    ingress = ServiceConfig.model_validate(application["args"]).ingress
    small, large = service.spec.rayClusterConfig.workerGroupSpecs
    assert small.groupName == "ingresses"
    assert ray_resources(small)["CPU"] == 0
    assert ray_resources(small)["ingress"] >= 2 * ingress.num_replicas * ingress.resources["ingress"]
    assert "ingress" not in ray_resources(large)
    assert small.minReplicas >= 2, "one is lost, one is left"


@pytest.mark.parametrize("name", DEPLOYMENT_OF)
def test_probes_memory_and_rights_of_every_pod(name: str) -> None:
    service = RayService.model_validate(manifest(name))
    for pod in pods(service):
        assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "gptj-serve"
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["spec"]["containers"]
        is_head = pod["metadata"]["labels"]["ray.io/group"] == "headgroup"
        raylet, proxy = {"path": "/api/healthz", "port": 52365}, {"path": "/-/healthz", "port": 8000}
        assert container["livenessProbe"]["httpGet"] == raylet
        assert container["readinessProbe"]["httpGet"] == (raylet if is_head else proxy)
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        assert container["securityContext"] == RIGHTS
        assert any(mount["mountPath"] == "/models" for mount in container["volumeMounts"])
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]
        assert {"name": "serve", "containerPort": 8000} in container["ports"]
    assert service.spec.rayClusterConfig.autoscalerOptions.securityContext == RIGHTS


RIGHTS = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}

OUR_PODS = {
    each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
    for _, each in OBJECTS
    if each["kind"] == "StatefulSet"
} | {
    f"{name}, {pod['metadata']['labels']['ray.io/group']}": pod["metadata"]["labels"]
    for name in DEPLOYMENT_OF
    for pod in pods(RayService.model_validate(manifest(name)))
}
"""The labels of each."""

OPERATORS = [  # as KubeRay's own Helm chart and kustomization label their pod
    {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"},
    {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"},
]


def selected(selector: dict[str, Any]) -> set[str]:
    wanted = selector["matchLabels"].items()
    return {name for name, labels in OUR_PODS.items() if wanted <= labels.items()}


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each["spec"] for _, each in OBJECTS if each["kind"] == kind}


def test_selectors_find_the_pods_that_they_are_for() -> None:
    rays = {name for name in OUR_PODS if ", " in name}
    policies = of_kind("NetworkPolicy")
    assert selected(policies["gptj-serve"]["podSelector"]) == rays
    assert selected(policies["gptj-redis"]["podSelector"]) == {"gptj-redis"}
    assert selected(of_kind("PodMonitor")["gptj-serve"]["selector"]) == rays
    budget = of_kind("PodDisruptionBudget")["gptj-serve-ingresses"]
    assert selected(budget["selector"]) == {f"{name}, ingresses" for name in DEPLOYMENT_OF}


def test_a_budget_lets_drains_go_on() -> None:
    """For pods whose owner has no scale subresource, nothing but an integer `minAvailable` does."""
    (budget,) = of_kind("PodDisruptionBudget").values()
    assert set(budget) == {"minAvailable", "selector"}
    for name in DEPLOYMENT_OF:
        small, _ = RayService.model_validate(manifest(name)).spec.rayClusterConfig.workerGroupSpecs
        assert isinstance(budget["minAvailable"], int)
        assert small.minReplicas > budget["minAvailable"]


@pytest.mark.parametrize("labels", OPERATORS, ids=["Helm", "kustomize"])
@pytest.mark.parametrize("policy", ["gptj-serve", "gptj-redis"])
def test_kuberays_operator_gets_in_however_it_is_installed(policy: str, labels: dict[str, str]) -> None:
    """From its own namespace, to the dashboard and to Redis."""
    froms = [each for rule in of_kind("NetworkPolicy")[policy]["ingress"] for each in rule["from"]]
    assert [
        each
        for each in froms
        if each.get("namespaceSelector") == {}
        and each.get("podSelector", {"matchLabels": {"": ""}})["matchLabels"].items() <= labels.items()
    ]


def test_names_that_must_agree_do() -> None:
    kinds = {(each["kind"], each["metadata"]["name"]) for _, each in OBJECTS}
    for name in DEPLOYMENT_OF:
        text = (DIRECTORY / f"{name}.yaml").read_text()
        assert "claimName: gptj-models" in text
        assert "redisAddress: gptj-redis:6379" in text
    assert {("PersistentVolumeClaim", "gptj-models"), ("Service", "gptj-redis")} <= kinds
    monitor = (DIRECTORY / "pod-monitor.yaml").read_text()
    prometheus = (ROOT / "cluster" / "monitoring" / "prometheus.yml").read_text()
    kept = re.compile(r"regex: (ray_\(.*\))$", re.MULTILINE)
    assert kept.findall(monitor) == kept.findall(prometheus) != []
