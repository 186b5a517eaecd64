{{- define "vd.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "vd.labels" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{- define "vd.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "vd.image" -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- /* What the verification service is started with; .targets are those of this release. */}}
{{- define "vd.service.args" -}}
{{- with .root.Values.service }}
- --host
- 0.0.0.0
- --port
- {{ .port | quote }}
- --database
- /data/verifications.db
{{- range concat $.targets .targets }}
- --target
- {{ . | quote }}
{{- end }}
{{- if .every }}
- --every
- {{ .every }}
{{- end }}
- --share
- {{ .share | quote }}
- --capacity
- {{ .capacity | quote }}
{{- range .extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The service's container, alone or as a sidecar. */}}
{{- define "vd.service.container" -}}
{{- $service := .root.Values.service -}}
name: service
image: {{ include "vd.image" (dict "root" .root "image" $service.image) }}
imagePullPolicy: {{ $service.image.pullPolicy }}
args:
  {{- include "vd.service.args" . | trim | nindent 2 }}
env:
  - name: VLLM_DETERMINISTIC_TOKEN
    valueFrom:
      secretKeyRef: {name: {{ required "service.token.existingSecret is needed: kubectl create secret generic NAME --from-literal=token=$(openssl rand -hex 32)" $service.token.existingSecret }}, key: {{ $service.token.key }}}
  {{- with .root.Values.server.apiKey }}
  {{- if .existingSecret }}
  - name: VLLM_DETERMINISTIC_API_KEY
    valueFrom:
      secretKeyRef: {name: {{ .existingSecret }}, key: {{ .key }}}
  {{- end }}
  {{- end }}
ports:
  - {name: http-service, containerPort: {{ $service.port }}}
readinessProbe:
  httpGet: {path: /ready, port: http-service}
  periodSeconds: 5
livenessProbe:
  httpGet: {path: /health, port: http-service}
  initialDelaySeconds: 10
  periodSeconds: 10
  timeoutSeconds: 3
resources:
  {{- toYaml $service.resources | nindent 2 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  readOnlyRootFilesystem: true
  allowPrivilegeEscalation: false
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
volumeMounts:
  - {name: history, mountPath: /data}
  - {name: tmp, mountPath: /tmp}
{{- end }}
